"""Which files of a corpus are read: through links, compressed, as tables; and what is said of all others."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.command import Answer, megagrow, refused, stored, write_family, write_jsonl

WORDS = "the grown model reads every token of a corpus and writes its loss".split()
TEXTS = [" ".join(WORDS[number % 5 :] + WORDS[: number % 7]) + f" {number}" for number in range(40)]


def prepare(root: Path, corpus: Path, **more: Any) -> Answer:
    return megagrow("data", write_family(root, {"paths": [str(corpus)]}, **more))


def trained_texts(root: Path) -> list[str]:
    import sentencepiece

    data = root / "save" / "data"
    model = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    return [model.decode(ids[:-1]) for ids in stored(data / "corpus_text_document")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    write_jsonl(directory / "first.jsonl", TEXTS[:20])
    return directory


# issue 12: E21
def test_a_linked_directory_is_read(tmp_path: Path, corpus: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    write_jsonl(elsewhere / "second.jsonl", TEXTS[20:])
    (corpus / "more").symlink_to(elsewhere.parent, target_is_directory=True)
    answer = prepare(tmp_path, corpus)
    assert answer.code == 0, answer
    assert trained_texts(tmp_path) == TEXTS
    assert "took 2 files, 40 documents" in answer.out


# issue 12: E21
def test_links_in_circles_end_and_nothing_is_read_twice(tmp_path: Path, corpus: Path) -> None:
    (corpus / "sub").mkdir()
    write_jsonl(corpus / "sub" / "second.jsonl", TEXTS[20:])
    (corpus / "again").symlink_to("sub", target_is_directory=True)
    (corpus / "sub" / "up").symlink_to(corpus, target_is_directory=True)
    (corpus / "above").symlink_to(tmp_path, target_is_directory=True)
    (corpus / "self").symlink_to("self")
    (corpus / "copy.jsonl").symlink_to("first.jsonl")
    answer = prepare(tmp_path, corpus)
    assert answer.code == 0, answer
    assert sorted(trained_texts(tmp_path)) == sorted(TEXTS)
    for part in ("link to a directory that is read", "link to a directory above it", "another path of a file that is"):
        assert part in answer.out, answer.out


# issue 12: E21
def test_what_is_passed_over_is_said_with_the_reason(tmp_path: Path, corpus: Path) -> None:
    for name in ("a.xz", "b.xz", ".hidden.txt", "picture.PNG", "README"):
        (corpus / name).write_bytes(b"no")
    (corpus / "gone.jsonl").symlink_to("nowhere")
    write_jsonl(corpus / "second.jsonl", ["", *TEXTS[20:], ""])
    answer = prepare(tmp_path, corpus)
    assert answer.code == 0, answer
    again = megagrow("data", tmp_path / "family.yaml")
    for out in (answer.out, again.out):
        assert "took 2 files, 40 documents; passed over" in out
        for part in ("2 of unknown type .xz", "1 hidden", "1 of unknown type .PNG", "1 without a file type"):
            assert part in out, out
        assert "1 a link to nothing" in out and "2 empty documents" in out and str(corpus / "a.xz") in out


# issue 12: E21
def test_zst_and_parquet_are_read(tmp_path: Path, corpus: Path) -> None:
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20:30]).encode()
    middle = lines.index(b"\n") + 4
    frames = [zstandard.ZstdCompressor().compress(part) for part in (lines[:middle], lines[middle:])]
    (corpus / "second.jsonl.zst").write_bytes(b"".join(frames))
    (corpus / "third.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(TEXTS[30].encode()))
    table = pyarrow.table({"id": list(range(9)), "text": TEXTS[31:]})
    parquet.write_table(table, corpus / "zulu.parquet", row_group_size=4)
    answer = prepare(tmp_path, corpus)
    assert answer.code == 0, answer
    assert trained_texts(tmp_path) == TEXTS
    assert "took 4 files, 40 documents" in answer.out


def zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(content))


def table(**columns: list[Any]) -> bytes:
    pyarrow, stream = pytest.importorskip("pyarrow"), io.BytesIO()
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


# issue 12: E21
@pytest.mark.parametrize(
    ("name", "make", "parts"),
    [
        (
            "a.jsonl.zst",
            lambda: zst(b'{"text": "x"}\n' * 50_000)[:-3],
            ("damaged Zstandard file", "ends inside a frame"),
        ),
        ("a.jsonl.zst", lambda: b"\x28\xb5\x2f\xfdjunk", ("damaged Zstandard file",)),
        ("a.jsonl.zst", lambda: zst(b'{"text": "x"}\n{"txt": "x"}\n'), ("a.jsonl.zst:2", "no field 'text'")),
        ("a.parquet", lambda: b"PAR1 junk", ("damaged Parquet file",)),
        ("a.parquet", lambda: table(body=["x"]), ("no column 'text'", "body")),
        ("a.parquet", lambda: table(text=["x", None]), ("row 1", "not text but NoneType")),
        ("a.parquet", lambda: table(text=[1]), ("row 0", "not text but int")),
        ("a.jsonl", lambda: b'{"text": ' + b"9" * 5000 + b"}", ("a.jsonl:1: not a JSON document",)),
        ("a.jsonl", lambda: b"[" * 100_000, ("a.jsonl:1: not a JSON document",)),
        ("a.jsonl.gz", lambda: gzip.compress(b'{"text": "x"}\n' * 5000)[:-20], ("damaged gzip",)),
    ],
)
def test_a_broken_file_is_named_in_one_line(
    tmp_path: Path, corpus: Path, name: str, make: Any, parts: tuple[str, ...]
) -> None:
    (corpus / name).write_bytes(make())
    refused(prepare(tmp_path, corpus), name, *parts)


# issue 12: E21
@pytest.mark.parametrize(("name", "library"), [("second.jsonl.zst", "zstandard"), ("second.parquet", "pyarrow")])
def test_without_the_extra_the_error_names_it(
    tmp_path: Path, corpus: Path, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    refused(prepare(tmp_path, corpus), name, "pip install 'megagrow[corpus]'")


# issue 12: E21
def test_a_corpus_of_unknown_tokens_is_refused(tmp_path: Path, corpus: Path) -> None:
    """A tokenizer for another script: each of its tokens is <unk>, and a loss of zero is soon reached."""
    model = tmp_path / "other.model"
    train_without_bytes(model, ["αβγδ εζηθ"] * 50)
    refused(
        prepare(tmp_path, corpus, tokenizer={"tokenizer_model": str(model)}), "unknown to the tokenizer", "'corpus'"
    )


# issue 12: E21
def test_some_unknown_tokens_are_counted(tmp_path: Path, corpus: Path) -> None:
    model = tmp_path / "other.model"
    train_without_bytes(model, TEXTS)
    write_jsonl(corpus / "second.jsonl", ["the loss of μ" for _ in range(20)])
    answer = prepare(tmp_path, corpus, tokenizer={"tokenizer_model": str(model)})
    assert answer.code == 0, answer
    assert "20 unknown tokens" in answer.out and "unknown to the tokenizer" in answer.err


def train_without_bytes(path: Path, texts: list[str]) -> None:
    import sentencepiece

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stream, vocab_size=60, model_type="bpe", hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(stream.getvalue())
