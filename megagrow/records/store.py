"""Append records to a file, read them back, and remove those of steps that will be repeated."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megagrow.errors import UserError
from megagrow.files.atomic import write_atomically
from megagrow.records.kinds import AnyRecord, JobRecord, Record, StageRecord

_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord, config=ConfigDict(defer_build=True))


def append(path: Path, record: Record) -> None:
    """Append one record as one line, in one write; first end a line that an earlier kill left half-written.

    Raises:
        UserError: the line could not be written completely, most likely because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
            line_end = b"\n" if end and stream.read(1) != b"\n" else b""
            line = line_end + record.model_dump_json().encode() + b"\n"
            if stream.write(line) < len(line):  # the disk became full within the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _write_error(path, error) from None


def read(path: Path) -> Iterator[AnyRecord]:
    """Yield the records of a file in order, skipping half-written lines; a missing file has no records.

    Raises:
        UserError: a complete line is not a record that this version knows.
    """
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield _ADAPTER.validate_json(line)
            except ValidationError as error:
                if line.endswith(b"\n") and _is_json(line):
                    first = error.errors()[0]
                    problem = ": ".join([*map(str, first["loc"]), first["msg"]])
                    raise UserError(f"{path}: line {number} is not a record known to this version: {problem}") from None


def rewind(path: Path, iteration: int, spare: tuple[type[Record], ...] = ()) -> None:
    """Remove a stage's records after `iteration`: the steps that a resumed run will repeat.

    Args:
        path: the stage's records.
        iteration: the last iteration whose records stay.
        spare: types of records that always stay.
    """
    if not path.exists():
        return
    kept = [r for r in read(path) if isinstance(r, (JobRecord, *spare)) or getattr(r, "iteration", 0) <= iteration]
    kept = [r for r in kept if not isinstance(r, StageRecord) or r.iterations <= iteration]
    try:
        write_atomically(path, "".join(r.model_dump_json() + "\n" for r in kept))
    except OSError as error:
        raise _write_error(path, error) from None


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: {error.strerror}: no records can be written here; fix that and run the command again")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # not JSON, or cut inside a character
        return False
    return True
