"""Text in, ids out: readers, a preparation that is whole or not there, and the blend of sources."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config import DataSource, Family, load_text
from megagrow.data import files, load_tokenizer, prepare, read_prepared, text
from megagrow.data.atomic import replacing
from megagrow.data.blend import blend
from megagrow.errors import DataError
from tests.unit.training.test_tokenizer import make_huggingface, make_texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in texts), encoding="utf-8")
    return path


def make_family(save: Path, paths: list[str], *overrides: str) -> Family:
    tree = {
        "name": "tiny",
        "save": str(save),
        "data": {"sources": [{"paths": paths}], "workers": 1, "split": "80,20,0"},
        "stages": [
            {
                "name": "a",
                "model": {
                    "num_layers": 1,
                    "hidden_size": 8,
                    "ffn_hidden_size": 8,
                    "num_attention_heads": 2,
                    "vocab_size": 340,
                    "seq_length": 16,
                },
                "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            }
        ],
    }
    return load_text(json.dumps(tree), overrides)


def pair_bytes(save: Path) -> tuple[bytes, bytes]:
    prefix = save / "data" / "corpus_text_document"
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def stored_documents(prefix: Path) -> list[list[int]]:
    """Documents of a .bin/.idx pair, read by the format's description and not by Megatron's reader."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    dtype = {4: np.int32, 8: np.uint16}[index[17]]
    count = int(np.frombuffer(index, np.int64, 1, 18)[0])
    ids = np.fromfile(f"{prefix}.bin", dtype)
    return [part.tolist() for part in np.split(ids, np.cumsum(np.frombuffer(index, np.int32, count, 34))[:-1])]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", make_texts(60))


# Readers


def test_a_directory_is_read_sorted_and_gz_like_plain(tmp_path: Path) -> None:
    (tmp_path / "b" / "sub").mkdir(parents=True)
    (tmp_path / "b" / "sub" / "z.md").write_text("fourth")
    (tmp_path / "b" / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline")
    (tmp_path / "b" / "c.py.gz").write_bytes(gzip.compress(b"second"))
    with gzip.open(tmp_path / "b" / "d.jsonl.gz", "wt") as stream:
        stream.write('{"body": "third"}\n\n{"body": ""}\n')
    for ignored in ("picture.png", ".hidden.txt"):
        (tmp_path / "b" / ignored).write_text("no")
    source = DataSource(paths=(str(tmp_path / "b"),), json_key="body")
    assert list(text.documents(source)) == ["first\r\nline", "second", "third", "fourth"]
    read: list[int] = []
    list(text.documents(source, read.append))
    assert sum(read) == text.size_on_disk(files.list_files(source).files)


def test_globs_and_repeated_paths_give_each_file_once(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "3.md"):
        (tmp_path / name).write_text(name)
    source = DataSource(paths=(str(tmp_path / "*.txt"), str(tmp_path / "1.txt"), str(tmp_path / "3.md")))
    assert list(text.documents(source)) == ["1.txt", "2.txt", "3.md"]


def test_python_stdlib_is_whole_and_in_a_mixed_order() -> None:
    source = DataSource(paths=("python-stdlib",))
    names = [file.path.relative_to(sysconfig.get_path("stdlib")).as_posix() for file in files.list_files(source).files]
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} < set(names)
    assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]
    assert names != sorted(names) and names == [
        file.path.relative_to(sysconfig.get_path("stdlib")).as_posix() for file in files.list_files(source).files
    ]
    packages = [name.split("/")[0] for name in names if "/" in name]
    assert len(set(packages[-len(packages) // 10 :])) > 5, "the last tenth, a validation split, mixes packages"
    assert sum(1 for _ in text.documents(source)) > 0.95 * len(names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", r"bad\.jsonl:2: not a JSON document"),
        (b'{"txt": "x"}', r"bad\.jsonl:2: no field 'text' \(it has: txt\)"),
        (b'["x"]', r"bad\.jsonl:2: no field 'text' \(it has: list\)"),
        (b'{"text": 3}', r"bad\.jsonl:2: field 'text' is not text but int"),
        (b'{"text": "\xff"}', r"bad\.jsonl:2: not a JSON document"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(text.documents(DataSource(paths=(str(path),))))


def test_bad_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"Gr\xf6sse")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-9])
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "gone": "gone' does not exist",
        "*.none": "matches nothing",
        "empty": "no text in .*empty",
        "model.bin": "unknown file type",
        "latin.txt": "latin.txt: not UTF-8",
        "torn.txt.gz": "torn.txt.gz: damaged gzip",
    }.items():
        with pytest.raises(DataError, match=message):
            list(text.documents(DataSource(paths=(str(tmp_path / name),))))


# Preparation


def test_prepared_ids_are_the_text_in_order_and_end_with_eod(tmp_path: Path, corpus: Path) -> None:
    family = make_family(tmp_path / "run", [str(corpus)])
    prepared = prepare(family)
    tokenizer = load_tokenizer(family.tokenizer, prepared.tokenizer)
    stored = stored_documents(prepared.prefixes["corpus"])
    assert [tokenizer.decode(ids[:-1]) for ids in stored] == make_texts(60)
    assert {ids[-1] for ids in stored} == {tokenizer.eod}
    assert prepared.documents == {"corpus": 60}
    assert prepared.tokens == {"corpus": sum(map(len, stored))}
    assert prepared == read_prepared(family)


def test_processes_change_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagrow.data.encode._BATCH_DOCUMENTS", 3)
    prepare(make_family(tmp_path / "one", [str(corpus)]))
    prepare(make_family(tmp_path / "two", [str(corpus)], "data.workers=2"))
    assert pair_bytes(tmp_path / "one") == pair_bytes(tmp_path / "two")


def test_again_does_nothing_and_needs_no_raw_text_to_train(tmp_path: Path, corpus: Path) -> None:
    family = make_family(tmp_path / "run", [str(corpus)])
    prepared = prepare(family)
    times = {file: file.stat().st_mtime_ns for file in prepared.directory.iterdir() if file.name != ".lock"}
    workers = make_family(tmp_path / "run", [str(corpus)], "data.workers=2")
    assert prepare(workers) == prepared, "the number of workers is no part of the data"
    assert times == {file: file.stat().st_mtime_ns for file in times}
    corpus.unlink()
    assert read_prepared(family) == prepared


def test_importing_and_finding_prepared_data_leaves_megatron_alone(tmp_path: Path, corpus: Path) -> None:
    family = make_family(tmp_path / "run", [str(corpus)])
    prepare(family)
    code = (
        "import sys; from megagrow.config import load_text; from megagrow.data import prepare, read_prepared\n"
        "f = load_text(sys.argv[1]); assert prepare(f) == read_prepared(f)\n"
        "print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    argument = json.dumps(family.model_dump(mode="json"))
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, cwd=root, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.split='90,10,0'", r"data\.split was '80,20,0'"),
        ("data.append_eod=false", r"data\.append_eod was True"),
        ("tokenizer.model_type=unigram", r"tokenizer\.model_type was 'bpe'"),
        ("stages.0.model.vocab_size=341", r"model\.vocab_size was 340"),
        ("data.sources.0.weight=2", r"data\.sources\.0\.weight was 1\.0"),
        ("seed=5", r"seed was 1234"),
    ],
)
def test_changed_settings_are_refused_by_name(tmp_path: Path, corpus: Path, override: str, place: str) -> None:
    directory = tmp_path / "run" / "data"
    directory.mkdir(parents=True)
    shutil.copy(_prepared_once(corpus), directory / "prepared.json")
    family = make_family(tmp_path / "run", [str(corpus)], override)
    for verb in (prepare, read_prepared):
        with pytest.raises(DataError, match=rf"{place} .* must not change once prepared; .* remove {directory}"):
            verb(family)


def _prepared_once(corpus: Path) -> Path:
    save = corpus.parent / "once"
    return prepare(make_family(save, [str(corpus)])).directory / "prepared.json"


def test_changed_text_is_refused_and_a_fresh_start_is_fresh(tmp_path: Path, corpus: Path) -> None:
    family = make_family(tmp_path / "run", [str(corpus)])
    before = prepare(family)
    write_jsonl(corpus, make_texts(50, seed=1))
    with pytest.raises(DataError, match=r"input corpus\..*corpus\.jsonl was .* bytes"):
        prepare(family)
    shutil.rmtree(before.directory)
    with pytest.raises(DataError, match="megagrow data FAMILY"):
        read_prepared(family)
    assert prepare(family).documents == {"corpus": 50}


def test_what_a_kill_left_behind_does_no_harm(tmp_path: Path, corpus: Path) -> None:
    prepare(make_family(tmp_path / "whole", [str(corpus)]))
    family = make_family(tmp_path / "killed", [str(corpus)])
    directory = tmp_path / "killed" / "data"
    (directory / "cache").mkdir(parents=True)
    for name in (".corpus_text_document.bin.0a.tmp", "corpus_text_document.bin", "tokenizer.model", "cache/old.npy"):
        (directory / name).write_bytes(b"half")
    with pytest.raises(DataError, match="not prepared"):
        read_prepared(family)
    prepare(family)
    assert pair_bytes(tmp_path / "killed") == pair_bytes(tmp_path / "whole")
    assert sorted(file.name for file in directory.iterdir()) == [
        ".lock",
        "corpus_text_document.bin",
        "corpus_text_document.idx",
        "prepared.json",
        "tokenizer.model",
    ]


def test_a_lost_file_is_noticed_and_made_again(tmp_path: Path, corpus: Path) -> None:
    family = make_family(tmp_path / "run", [str(corpus)])
    prefix = prepare(family).prefixes["corpus"]
    before = pair_bytes(tmp_path / "run")
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(DataError, match=r"corpus_text_document\.idx is missing"):
        read_prepared(family)
    prepare(family)
    assert pair_bytes(tmp_path / "run") == before


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", full)
    with pytest.raises(DataError, match=r"corpus_text_document\.(bin|idx): No space left"):
        prepare(make_family(tmp_path / "run", [str(corpus)]))
    assert sorted(file.name for file in (tmp_path / "run" / "data").iterdir()) == [".lock", "tokenizer.model"]


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]
    (tmp_path / "plain").write_text("")
    with pytest.raises(DataError, match="cannot be written"), replacing(tmp_path / "plain" / "below"):
        pass


def test_empty_corpora_and_oversized_tokenizers_are_refused(tmp_path: Path, corpus: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(DataError, match=r"source 'corpus' is empty: no text in .*empty\.jsonl"):
        prepare(make_family(tmp_path / "run", [str(empty)]))
    model = prepare(make_family(tmp_path / "first", [str(corpus)])).tokenizer
    given_model = (f"tokenizer.tokenizer_model={model}", "stages.0.model.vocab_size=300")
    with pytest.raises(DataError, match=r"has \d+ ids, model.vocab_size is 300"):
        prepare(make_family(tmp_path / "second", [str(corpus)], *given_model))


def test_a_huggingface_tokenizer_travels_with_the_data(tmp_path: Path, corpus: Path) -> None:
    model = make_huggingface(tmp_path / "hf", {"eos_token": "<stop>"}).tokenizer_model
    overrides = ("tokenizer.tokenizer_type=HuggingFace", f"tokenizer.tokenizer_model={model}")
    family = make_family(tmp_path / "run", [str(corpus)], *overrides)
    prepared = prepare(family)
    assert prepared.tokenizer == tmp_path / "run" / "data" / "tokenizer.json"
    tokenizer = load_tokenizer(family.tokenizer, prepared.tokenizer)
    assert {ids[-1] for ids in stored_documents(prepared.prefixes["corpus"])} == {0} == {tokenizer.eod}


def test_existing_pairs_are_checked_and_used_as_they_are(tmp_path: Path, corpus: Path) -> None:
    made = prepare(make_family(tmp_path / "first", [str(corpus)]))
    prefix = made.prefixes["corpus"]
    sources = f"data.sources=[{{name: ready, prefix: '{prefix}'}}]"
    used = prepare(make_family(tmp_path / "second", [str(corpus)], sources))
    assert used.prefixes == {"ready": prefix} and used.tokenizer is None
    assert (used.documents["ready"], used.tokens["ready"]) == (60, made.tokens["corpus"])
    small = make_family(tmp_path / "third", [str(corpus)], sources, "stages.0.model.vocab_size=100")
    with pytest.raises(DataError, match=r"contains the id \d+, model.vocab_size is 100"):
        prepare(small)
    with pytest.raises(DataError, match=r"gone\.bin does not exist"):
        prepare(make_family(tmp_path / "fourth", [str(corpus)], "data.sources=[{name: ready, prefix: gone}]"))
    Path(f"{prefix}.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="has 2 bytes, its index describes"):
        prepare(make_family(tmp_path / "fifth", [str(corpus)], sources))


# The blend


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(0, 300), st.integers(0, 300))
def test_a_blend_is_fair_and_goes_on_from_any_point(weights: list[float], before: int, after: int) -> None:
    shares, none = np.array(weights), np.zeros(len(weights), dtype=np.int64)
    whole = blend(shares, none, before + after)
    first = blend(shares, none, before)
    counts = np.bincount(first.source, minlength=len(weights))
    rest = blend(shares, counts, after)
    assert np.concatenate([first.source, rest.source]).tolist() == whole.source.tolist()
    assert np.concatenate([first.index, rest.index]).tolist() == whole.index.tolist()
    for source in range(len(weights)):
        assert whole.index[whole.source == source].tolist() == list(range(int(np.sum(whole.source == source))))
    assert np.abs(counts - before * shares / shares.sum()).max() <= max(1.0, len(weights) / 2)


def test_a_blend_of_bounded_sources_takes_all_there_is() -> None:
    choice = blend(np.array([1.0, 3.0]), np.zeros(2, dtype=np.int64), 10, sizes=np.array([4, 2]))
    assert choice.source.tolist() == [1, 0, 1, 0, 0, 0]
    assert choice.index.tolist() == [0, 0, 1, 1, 2, 3]
