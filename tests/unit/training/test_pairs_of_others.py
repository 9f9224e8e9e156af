"""A .bin/.idx pair that others made: every id and the whole index are checked, once, before anything is trained."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.unit.training.command import megagrow, refused, saved_data, write_family, write_pair

DOCUMENTS = [list(range(first, first + 20)) for first in range(0, 300, 10)]


def family_of(root: Path, dtype: type = np.int32, documents: list[list[int]] = DOCUMENTS) -> tuple[Path, Path]:
    """A family whose only source is a pair, and the pair's prefix."""
    prefix = write_pair(root / "others", documents, dtype)
    return write_family(root, {"prefix": str(prefix)}), prefix


# issue 12: E20
def test_a_negative_id_is_refused_with_its_place(tmp_path: Path) -> None:
    documents = [list(ids) for ids in DOCUMENTS]
    documents[7][3] = -1
    family, _ = family_of(tmp_path, np.int32, documents)
    refused(megagrow("data", family), "the id -1", "document 7, token 3", "'corpus'", "others.bin")


# issue 12: E20
def test_ids_that_overflowed_int16_are_refused(tmp_path: Path) -> None:
    documents = [list(ids) for ids in DOCUMENTS]
    documents[2][0] = 40000 - 2**16
    family, _ = family_of(tmp_path, np.int16, documents)
    refused(megagrow("data", family), "the id -25536", "document 2, token 0", "int16", "overflowed")


# issue 12: E20
def test_an_id_above_the_vocabulary_is_found_wherever_it_is(tmp_path: Path) -> None:
    """The old check read the first 64 million ids."""
    documents = [[1, 2, 3] * 20, list(range(100)), []]
    documents += [[5, 400]]
    prefix = write_pair(tmp_path / "others", documents, np.uint16)
    family = write_family(tmp_path, {"prefix": str(prefix)})
    refused(
        megagrow("data", family), "the id 400", "model.vocab_size is 400", "document 3, token 1", "larger tokenizer"
    )


# issue 12: E20
@pytest.mark.parametrize("value", [-1, 400])
def test_the_last_id_of_a_long_pair_is_read(tmp_path: Path, value: int) -> None:
    count = 2**26 + 10
    prefix = tmp_path / "others"
    write_pair(prefix, [[1] * 64] * 8, np.int32)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.truncate(4 * count)
        stream.seek(4 * count - 4)
        stream.write(np.int32(value).tobytes())
    lengths = np.array([count - 64, 64], np.int32)
    head = Path(f"{prefix}.idx").read_bytes()[:18] + (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    pointers = np.array([0, 4 * (count - 64)], np.int64)
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + np.arange(3).tobytes())
    family = write_family(tmp_path, {"prefix": str(prefix)})
    refused(megagrow("data", family), f"the id {value}", "document 1, token 63")


# issue 12: E20
def test_a_training_refuses_what_changed_since_the_scan(tmp_path: Path) -> None:
    family, prefix = family_of(tmp_path)
    assert megagrow("data", family).code == 0
    ids = np.fromfile(f"{prefix}.bin", np.int32)
    ids[45] = -1
    ids.tofile(f"{prefix}.bin")
    refused(megagrow("train", family, "--stage", "a"), "the id -1", "document 2, token 5")
    ids[45] = 7
    ids.tofile(f"{prefix}.bin")
    for answer in (megagrow("data", family), megagrow("train", family, "--stage", "a")):
        refused(answer, "others", "must not change once prepared")


# issue 12: E20
def test_a_scan_happens_once_and_again_for_other_files(tmp_path: Path) -> None:
    family, prefix = family_of(tmp_path)
    first = megagrow("data", family)
    assert first.code == 0 and "ids from 0 to 309" in first.err and "MB/s" in first.err
    note = json.loads((saved_data(family) / "scans.json").read_text())[str(prefix)]
    assert (note["minimum"], note["maximum"]) == (0, 309)
    assert "MB/s" not in megagrow("data", family).err
    os.utime(f"{prefix}.bin", ns=(time.time_ns(), time.time_ns() + 10**9))
    touched = megagrow("data", family)
    assert touched.code == 0 and "MB/s" in touched.err, "the same content is no change, but it is read to know that"
    assert "MB/s" not in megagrow("data", family).err
    copy = Path(f"{prefix}.copy")
    copy.write_bytes(Path(f"{prefix}.bin").read_bytes())
    times = Path(f"{prefix}.bin").stat()
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    copy.replace(f"{prefix}.bin")
    assert "MB/s" in megagrow("data", family).err, "another inode of the same size and time is another file"


# issue 12: E20
def test_data_prepared_before_scans_existed_is_scanned_by_the_training(tmp_path: Path) -> None:
    family, prefix = family_of(tmp_path)
    assert megagrow("data", family).code == 0
    (saved_data(family) / "scans.json").unlink()
    record = saved_data(family) / "prepared.json"
    old = json.loads(record.read_text())
    for name in ("version", "checksums", "pairs"):
        old.pop(name)
    record.write_text(json.dumps(old))
    before = Path(f"{prefix}.bin").stat()
    ids = np.fromfile(f"{prefix}.bin", np.int32)
    ids[-1] = -1
    ids.tofile(f"{prefix}.bin")
    os.utime(f"{prefix}.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(megagrow("train", family, "--stage", "a"), "the id -1")
    ids[-1] = 309
    ids.tofile(f"{prefix}.bin")
    os.utime(f"{prefix}.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    answer = megagrow("train", family, "--stage", "a")
    assert answer.code == 0 and "MB/s" in answer.err, answer


# issue 12: E20
@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("floats", "type number 7"),
        ("short", "too few for its 30 documents"),
        ("gap", "document 2 does not begin where the last one ends"),
        ("negative", "document 1 does not begin where"),
        ("text", "not an index of tokens"),
        ("missing", "others.bin does not exist"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, damage: str, part: str) -> None:
    family, prefix = family_of(tmp_path, np.float32 if damage == "floats" else np.int32)
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    if damage == "short":
        content = content[:200]
    elif damage == "gap":
        place = 34 + 4 * 30 + 8 * 2
        content[place : place + 8] = (200).to_bytes(8, "little")
    elif damage == "negative":
        content[38:42] = (-20).to_bytes(4, "little", signed=True)
    elif damage == "text":
        content = bytearray(b"hello " * 100)
    elif damage == "missing":
        Path(f"{prefix}.bin").unlink()
    index.write_bytes(content)
    refused(megagrow("data", family), part)


# issue 12: E20
def test_own_data_that_lost_its_end_is_noticed(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 30)
    family = write_family(tmp_path, {"paths": [str(corpus.parent / "*.txt")]})
    assert megagrow("data", family).code == 0
    own = saved_data(family) / "corpus_text_document.bin"
    whole = own.read_bytes()
    own.write_bytes(whole[:-100])
    refused(megagrow("train", family, "--stage", "a"), own, "incomplete")
    assert megagrow("data", family).code == 0 and own.read_bytes() == whole
