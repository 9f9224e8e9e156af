"""What W&B wrote of its offline runs, read from its own files: a LevelDB log of protocol buffers each."""

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAGIC = 7  # bytes of W&B's own before the log
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")  # checksum, length, kind


def records_of_runs(stage: Path) -> list[list[Any]]:
    """The records of every offline run of a stage, oldest first, once the run's last one is there.

    W&B's own process writes, and may be behind ours until we exit, whose run was finished before that: until then a
    file may end anywhere.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # generated code

    found = []
    for path in sorted(stage.glob("wandb/offline-run-*/*.wandb")):
        deadline, records = time.monotonic() + 60, list[Any]()
        while not any(is_a(record, "exit") for record in records):
            assert time.monotonic() < deadline, f"{path} has no end: {len(records)} records"
            time.sleep(0.05)
            records = [Record.FromString(entry) for entry in entries_of(path)]
        found.append(records)
    return found


def is_a(record: Any, kind: str) -> bool:
    """Whether a record is of a kind: `run`, `history`, `summary`, `exit`."""
    return bool(record.WhichOneof("record_type") == kind)


def entries_of(path: Path) -> Iterator[bytes]:
    """The entries that are whole in a file that may be written just now, up to the first that is not."""
    content, place, entry = path.read_bytes(), _MAGIC, b""
    while place + _HEADER.size <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:  # no room for a header: the block's end is padded
            place += left
            continue
        checksum, length, kind = _HEADER.unpack_from(content, place)
        place += _HEADER.size
        fragment = content[place : place + length]
        if len(fragment) < length or zlib.crc32(bytes([kind]) + fragment) != checksum:
            return
        entry += fragment
        place += length
        if kind in (1, 4):  # whole, or the last fragment
            yield entry
            entry = b""
