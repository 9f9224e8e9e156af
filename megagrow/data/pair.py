"""A .bin/.idx pair: its index, a scan of all its ids, and its parts for training and validation.

Only numpy is needed here, so a plan can read an index on a login node. An .idx has a magic, a version and a code for
the type of the ids; the length of every document (int32) and its first byte in the .bin (int64). "Document" means what
Megatron calls a sequence: the unit by which it splits and shuffles.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from megagrow import log
from megagrow.config import Family
from megagrow.errors import DataError

ENDINGS = (".bin", ".idx")
_MAGIC, _HEADER = b"MMIDIDX\0\0" + (1).to_bytes(8, "little"), 34
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_BLOCK_BYTES = 2**25
_BLOCK_DOCUMENTS = 2**22
_SECONDS_BETWEEN_LINES = 60.0
_PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Pair:
    """An index that fits its .bin: lengths of the documents in ids, int32 [n], and first bytes, int64 [n]; mapped."""

    prefix: Path
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of ids in the .bin."""
        return Path(f"{self.prefix}.bin").stat().st_size // self.dtype.itemsize


class Scan(NamedTuple):
    """What all ids of a pair lie between, and a checksum of both files."""

    minimum: int
    maximum: int
    checksum: str


class Part(NamedTuple):
    """One part of the split of a source: its documents and tokens, and the documents of the whole source."""

    documents: int
    tokens: int
    of: int


def file_states(prefix: Path) -> dict[str, str]:
    """Return size, time of the last change and inode of both files of a pair; DataError if one is missing."""
    states = {}
    for ending in ENDINGS:
        try:
            status = Path(f"{prefix}{ending}").stat()
        except OSError as error:
            raise DataError(f"{prefix}{ending}: cannot be read: {error.strerror}") from None
        states[ending] = f"{status.st_size} bytes, mtime {status.st_mtime_ns}, inode {status.st_ino}"
    return states


def fits(prefix: Path, tokens: int) -> bool:
    """Whether a .bin has the size of that many ids of the type that its .idx names; both files must exist."""
    with open(f"{prefix}.idx", "rb") as stream:
        head = stream.read(_HEADER)
    known = len(head) == _HEADER and head[17] in _DTYPES
    return known and Path(f"{prefix}.bin").stat().st_size == tokens * np.dtype(_DTYPES[head[17]]).itemsize


def open_pair(source: str, prefix: Path, *, check: bool = True) -> Pair:
    """Map the index of a pair; DataError if it is not one or, with `check`, does not describe the .bin without gaps."""
    where = f"source {source!r}: {prefix}.idx"
    try:
        with open(f"{prefix}.idx", "rb") as stream:
            head, size = stream.read(_HEADER), stream.seek(0, 2)
        bin_size = Path(f"{prefix}.bin").stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if len(head) < _HEADER or not head.startswith(_MAGIC):
        raise DataError(f"{where} is not an index of tokens: it does not start as Megatron writes one")
    if (code := head[17]) not in _DTYPES:
        raise DataError(f"{where}: ids of type number {code}, which is no integer; token ids are integers")
    count, dtype = int.from_bytes(head[18:26], "little"), np.dtype(_DTYPES[code])
    if size < _HEADER + 12 * count:
        raise DataError(f"{where} has {size} bytes, too few for its {count} documents: it is incomplete")
    if not count or not bin_size:
        raise DataError(f"source {source!r}: {prefix} is empty")
    lengths = np.memmap(f"{prefix}.idx", np.int32, "r", _HEADER, (count,))
    pointers = np.memmap(f"{prefix}.idx", np.int64, "r", _HEADER + 4 * count, (count,))
    described = _check_index(where, lengths, pointers, dtype.itemsize) if check else bin_size
    if bin_size != described:
        raise DataError(
            f"source {source!r}: {prefix}.bin has {bin_size} bytes, its index describes {described}: not a pair"
        )
    return Pair(prefix, dtype, lengths, pointers)


def _check_index(where: str, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Check that every document follows the one before; return the number of bytes described."""
    end = 0
    for first in range(0, len(lengths), _BLOCK_DOCUMENTS):
        block = lengths[first : first + _BLOCK_DOCUMENTS].astype(np.int64)
        ends = end + np.cumsum(block) * itemsize
        wrong = (block < 0) | (pointers[first : first + _BLOCK_DOCUMENTS] != ends - block * itemsize)
        if wrong.any():
            raise DataError(f"{where}: document {first + int(wrong.argmax())} does not begin where the last one ends")
        end = int(ends[-1])
    return end


def scan_ids(source: str, pair: Pair, vocab_size: int) -> Scan:
    """Read all ids of a pair once, in order; DataError, naming id and place, if one is not in [0, vocab_size).

    Memory is bounded by one block. A line a minute, and one at the end, reports progress and MB/s.
    """
    checksum, smallest, largest = xxhash.xxh3_128(), [], []
    started = shown = time.monotonic()
    done, total = 0, Path(f"{pair.prefix}.bin").stat().st_size
    for block in _blocks(pair):
        smallest.append(int(block.min()))
        largest.append(int(block.max()))
        if smallest[-1] < 0 or largest[-1] >= vocab_size:
            _refuse(source, pair, block, done, vocab_size)
        checksum.update(block.data.cast("B"))
        done += block.nbytes
        if time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            log.get("data").info("%s: checked %s", source, _speed(done, shown - started, total))
    with open(f"{pair.prefix}.idx", "rb") as stream:
        while data := stream.read(_BLOCK_BYTES):
            checksum.update(data)
    scan = Scan(min(smallest), max(largest), checksum.hexdigest())
    log.get("data").info(
        "%s: checked %s: ids from %d to %d", source, _speed(done, time.monotonic() - started), *scan[:2]
    )
    return scan


def _blocks(pair: Pair) -> Iterator[np.ndarray]:
    """Yield all ids in order, int [n], in a buffer that the next block overwrites."""
    buffer = np.empty(_BLOCK_BYTES // pair.dtype.itemsize, pair.dtype)
    view = buffer.data.cast("B")
    with open(f"{pair.prefix}.bin", "rb", buffering=0) as stream:
        while size := stream.readinto(view):
            # a short read may end inside an id
            while size % pair.dtype.itemsize and (more := stream.readinto(view[size:])):
                size += more
            yield buffer[: size // pair.dtype.itemsize]


def _refuse(source: str, pair: Pair, block: np.ndarray, before: int, vocab_size: int) -> None:
    """Raise the error for the first wrong id of a block that starts at the byte `before`."""
    at = int(((block < 0) | (block >= vocab_size)).argmax())
    place = before + at * pair.dtype.itemsize
    document = int(np.searchsorted(pair.pointers, place, side="right")) - 1
    position = (place - int(pair.pointers[document])) // pair.dtype.itemsize
    value = int(block[at])
    why = "no id is negative: it was made for a loss mask, or its ids overflowed" if value < 0 else (
        "it was made with a larger tokenizer"
    )  # fmt: skip
    raise DataError(
        f"source {source!r}: {pair.prefix}.bin contains the id {value}, model.vocab_size is {vocab_size}: {why} "
        f"(document {document}, token {position} of it, both from 0, type {pair.dtype.name})"
    )


def _speed(done: int, seconds: float, total: int = 0) -> str:
    of = f" of {total / 1e6:,.0f}" if total else ""
    return f"{done / 1e6:,.1f}{of} MB at {done / 1e6 / max(seconds, 1e-9):,.0f} MB/s"


# The parts of a split


def bounds(split: str, documents: int, part: str) -> tuple[int, int]:
    """Return the first document of a part (train, valid or test) of a split, and the one after its last.

    The same numbers, by the same roundings, as Megatron's BlendedMegatronDatasetBuilder.
    """
    weights = np.array([float(weight) for weight in split.split(",")])
    edges = [0.0, *accumulate((weights / weights.sum()).tolist())]
    number = _PARTS.index(part)
    return round(edges[number] * documents), round(edges[number + 1] * documents)


def part_of(pair: Pair, split: str, part: str) -> Part:
    """Count a part of the split of a source."""
    begin, end = bounds(split, len(pair.lengths), part)
    return Part(end - begin, int(pair.lengths[begin:end].sum(dtype=np.int64)), len(pair.lengths))


def samples_of(tokens: int, seq_length: int) -> int:
    """Number of samples in a part. Labels are the tokens shifted by one, so the last sample needs one more token."""
    return max(tokens - 1, 0) // seq_length


def check_train(family: Family, parts: Mapping[str, Part]) -> None:
    """Raise DataError, with the numbers, if a source has not one training sample of the family's longest."""
    seq_length = max(stage.model.seq_length for stage in family.stages)
    for name, part in parts.items():
        if not samples_of(part.tokens, seq_length):
            raise DataError(
                f"too few tokens for one sample of seq_length {seq_length} + 1: "
                f"{_describe(name, part, 'train', family.data.split)}; add text or reduce seq_length"
            )


def check_valid(family: Family, parts: Mapping[str, Part]) -> None:
    """Raise DataError, with the numbers, if no source has a validation sample; warn if there are fewer than asked."""
    seq_length, wanted = family.stages[0].model.seq_length, family.evaluation.eval_samples
    found = sum(samples_of(part.tokens, seq_length) for part in parts.values())
    if not found:
        contents = "; ".join(_describe(name, part, "valid", family.data.split) for name, part in parts.items())
        raise DataError(
            f"the validation split has no sample: {contents}; "
            "enlarge it in data.split or split the text into more documents (a text file is one, as is a JSONL line)"
        )
    if found < wanted:
        log.get("data").warning(
            "evaluation.eval_samples is %d, the validation split has only %d: using all of them", wanted, found
        )


def _describe(name: str, part: Part, which: str, split: str) -> str:
    content = f"{part.documents} of {part.of} documents, {part.tokens} tokens"
    return f"source {name!r} has {content} in the {which} part of split {split}"
