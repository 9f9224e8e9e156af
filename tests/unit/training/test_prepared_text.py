"""What `megagrow data` says of a text, what it checks, and when prepared data is still that of the family."""

import importlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.training.command import Answer, megagrow, refused, saved_data, write_family, write_jsonl, write_pair

TEXTS = [f"document {number} of a corpus " * 3 + "x" * (number % 7) for number in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return write_jsonl(tmp_path / "corpus" / "texts.jsonl", TEXTS).parent


def prepare(root: Path, corpus: Path, **more: object) -> Answer:
    return megagrow("data", write_family(root, {"paths": [str(corpus)]}, **more))


# issue 12: E22
def test_characters_that_become_blanks_are_counted(tmp_path: Path, corpus: Path) -> None:
    write_jsonl(corpus / "marks.jsonl", ["a\u2581b \u2581", "plain"])
    answer = prepare(tmp_path, corpus)
    assert answer.code == 0, answer
    assert "2 characters U+2581 become blanks" in answer.err and "2 characters U+2581" in answer.out
    assert "2 characters U+2581" in megagrow("data", tmp_path / "family.yaml").out


# issue 12: E22
def test_a_text_without_them_is_not_warned_of(tmp_path: Path, corpus: Path) -> None:
    answer = prepare(tmp_path, corpus)
    assert answer.code == 0 and "U+2581" not in answer.err + answer.out


# issue 12: E22
@pytest.mark.parametrize(
    ("line", "part"),
    [("{broken", "not a JSON document"), ('{"body": "x"}', "no field 'text'"), ('{"text": 3}', "not text but int")],
)
def test_a_broken_document_is_named_while_a_tokenizer_is_trained(
    tmp_path: Path, corpus: Path, line: str, part: str
) -> None:
    with open(corpus / "texts.jsonl", "a") as stream:
        stream.write(line + "\n")
    message = refused(prepare(tmp_path, corpus), "texts.jsonl:41", part)
    assert "sentencepiece" not in message.lower() and "site-packages" not in message


# issue 12: E22
def test_prepared_data_is_enough_when_the_text_is_gone(tmp_path: Path, corpus: Path) -> None:
    assert prepare(tmp_path, corpus).code == 0
    family, own = tmp_path / "family.yaml", saved_data(tmp_path / "family.yaml") / "corpus_text_document.bin"
    before = own.read_bytes()
    shutil.rmtree(corpus)
    answer = megagrow("data", family)
    assert answer.code == 0 and "gone" in answer.err and own.read_bytes() == before
    own.unlink()
    refused(megagrow("data", family), own, "cannot be made again", "texts.jsonl")


# issue 12: E22
def test_a_touched_file_of_the_same_content_is_no_edit(tmp_path: Path, corpus: Path) -> None:
    assert prepare(tmp_path, corpus).code == 0
    family, text = tmp_path / "family.yaml", corpus / "texts.jsonl"
    for _ in range(2):
        os.utime(text, ns=(time.time_ns(), time.time_ns() + 10**9))
        assert megagrow("data", family).code == 0
    content = text.read_bytes()
    text.write_bytes(content.replace(b"corpus", b"chorus"))
    refused(megagrow("data", family), "texts.jsonl", "must not change once prepared")
    text.write_bytes(content)
    assert megagrow("data", family).code == 0
    write_jsonl(corpus / "new.jsonl", ["new"])
    refused(megagrow("data", family), "new.jsonl", "was 'absent'")


# issue 12: E22
def test_a_touched_tokenizer_is_no_edit_but_another_is(tmp_path: Path, corpus: Path) -> None:
    assert prepare(tmp_path, corpus).code == 0
    model = tmp_path / "given.model"
    shutil.copy(saved_data(tmp_path / "family.yaml") / "tokenizer.model", model)
    (tmp_path / "second").mkdir()
    family = write_family(tmp_path / "second", {"paths": [str(corpus)]}, tokenizer={"tokenizer_model": str(model)})
    assert megagrow("data", family).code == 0
    os.utime(model, ns=(1, 10**18))
    assert megagrow("data", family).code == 0
    content = bytearray(model.read_bytes())
    content[100] ^= 1
    model.write_bytes(content)
    refused(megagrow("data", family), "given.model", "must not change")
    model.unlink()
    assert megagrow("data", family).code == 0


# issue 12: E22
def test_a_validation_split_without_a_sample_is_refused_by_data(tmp_path: Path, corpus: Path) -> None:
    answer = prepare(tmp_path, corpus, data={"split": "999,1,0"})
    refused(answer, "the validation split has no sample", "0 of 40 documents", "data.split")


# issue 12: E22
def test_a_training_split_without_a_sample_is_refused_by_data(tmp_path: Path, corpus: Path) -> None:
    answer = prepare(tmp_path, corpus, model={"seq_length": 4096})
    refused(answer, "too few tokens for one sample of seq_length 4096", "reduce seq_length")


# issue 12: E22
def test_both_splits_of_a_given_pair_are_checked_by_data(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "given", [[1, 2, 3]] * 5 + [[4] * 200], np.uint16)
    refused(
        megagrow("data", write_family(tmp_path, {"prefix": str(prefix)})), "too few tokens", "15 tokens in the train"
    )


# issue 12: E22
def test_few_validation_samples_are_said_by_data(tmp_path: Path, corpus: Path) -> None:
    answer = prepare(tmp_path, corpus, evaluation={"eval_samples": 1000})
    assert answer.code == 0 and "eval_samples is 1000, the validation split has only" in answer.err


# issue 12: E22
def test_the_edges_of_a_split_are_those_of_megatron() -> None:
    datasets = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    from megagrow.data.pair import bounds

    for split in ("949,50,1", "80,20,0", "1,1,1", "0.7,0.2,0.1", "99.9,0.1,0", "3,7,11", "5,5,0"):
        vector = datasets.parse_and_normalize_split(split)
        for documents in (1, 2, 3, 7, 50, 999, 1001, 123_456_789):
            for part, matrix in zip(
                ("train", "valid", "test"), datasets.convert_split_vector_to_split_matrix(vector), strict=True
            ):
                edges = tuple(round(edge * documents) for edge in matrix or (0, 0))
                begin, end = bounds(split, documents, part)
                assert (begin, end) == edges or (matrix is None and begin == end)


# issue 12: E22
def test_a_source_that_is_read_several_times_is_said_by_plan_and_data(tmp_path: Path, corpus: Path) -> None:
    prefix = write_pair(tmp_path / "given", [[1, 2, 3, 4] * 8] * 20, np.uint16)
    sources: list[dict[str, Any]] = [
        {"name": "small", "prefix": str(prefix), "weight": 3},
        {"name": "web", "paths": [str(corpus)]},
    ]
    model = tmp_path / "given.model"
    assert prepare(tmp_path, corpus).code == 0
    shutil.move(saved_data(tmp_path / "family.yaml") / "tokenizer.model", model)
    (tmp_path / "second").mkdir()
    # 40 steps of 4 samples: 120 of `small`, which has (16 * 32 - 1) // 16 = 31 in its training split
    family = write_family(tmp_path / "second", sources, tokenizer={"tokenizer_model": str(model)}, steps=40)
    assert "times over" not in megagrow("plan", family).err
    for verb in ("data", "plan"):
        answer = megagrow(verb, family)
        assert answer.code == 0 and "'small' will be read 3.9 times over" in answer.err, answer
        assert "512 tokens" in answer.err and "'web' will be read 1.2 times over" in answer.err
    (tmp_path / "third").mkdir()
    alone = write_family(tmp_path / "third", {"prefix": str(prefix)}, steps=40)
    answer = megagrow("plan", alone)
    assert "'corpus' will be read 5.2 times over" in answer.err, "a given pair needs no preparation to be counted"
    assert "times over" not in megagrow("plan", write_family(tmp_path / "third", {"prefix": str(prefix)}, steps=4)).err


# issue 12: E22
def test_cache_files_of_finished_epochs_are_removed(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "given", [[1, 2, 3, 4] * 8] * 20, np.uint16)
    family = write_family(tmp_path, {"prefix": str(prefix)}, steps=60)
    assert megagrow("data", family).code == 0
    cache = saved_data(family) / "cache"
    cache.mkdir()
    for kind in ("document", "sample", "shuffle"):
        (cache / f"{'0' * 32}-train-1234-{kind}.npy").write_bytes(b"of an older megagrow")
    answer = megagrow("train", family, "--stage", "a")
    assert answer.code == 0, answer
    names = sorted(path.name for path in cache.glob("*.npy"))
    # 240 samples are 7.7 epochs of 31; the last two and validation's one are kept
    assert len(names) == 9, names


# issue 12: E22
def test_a_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("megagrow.data.prepare")
    make = module._make

    def and_change(*arguments: object) -> object:
        made = make(*arguments)  # type: ignore[arg-type]  # parameters of two kinds
        write_jsonl(corpus / "texts.jsonl", [*TEXTS, "more"])
        return made

    monkeypatch.setattr(module, "_make", and_change)
    refused(prepare(tmp_path, corpus), "changed while", "run this again")
    assert not (saved_data(tmp_path / "family.yaml") / "prepared.json").exists()
