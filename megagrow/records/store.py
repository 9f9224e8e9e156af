"""Append records to a file, read them back, and take out those of steps that will be done again."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megagrow.atomic import write_whole
from megagrow.errors import UserError
from megagrow.records.kinds import AnyRecord, JobRecord, Record, StageRecord

_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord, config=ConfigDict(defer_build=True))


def append(path: Path, record: Record) -> None:
    """Append one record as one line, in one write; a line torn by an earlier kill is closed off first.

    Raises:
        UserError: it could not be written whole, most likely because the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
            torn = b"\n" if end and stream.read(1) != b"\n" else b""
            line = torn + record.model_dump_json().encode() + b"\n"
            if stream.write(line) < len(line):  # what a disk does that becomes full within the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _unwritten(path, error) from None


def read(path: Path) -> Iterator[AnyRecord]:
    """Yield the records of a file in order; a missing file has none; a torn line is passed over.

    Raises:
        UserError: a whole line is no record that this version knows.
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
                    what = ": ".join([*map(str, first["loc"]), first["msg"]])
                    raise UserError(f"{path}: line {number} is no record that this megagrow knows: {what}") from None


def rewind(path: Path, iteration: int, spare: tuple[type[Record], ...] = ()) -> None:
    """Drop the records of a stage that lie after `iteration`: the steps a resumed run will do again.

    Args:
        path: the stage's records.
        iteration: the last that stays.
        spare: kinds that stay wherever they lie.
    """
    if not path.exists():
        return
    kept = [r for r in read(path) if isinstance(r, (JobRecord, *spare)) or getattr(r, "iteration", 0) <= iteration]
    kept = [r for r in kept if not isinstance(r, StageRecord) or r.iterations <= iteration]
    try:
        write_whole(path, "".join(r.model_dump_json() + "\n" for r in kept))
    except OSError as error:
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: {error.strerror}: nothing can be recorded here; mend that and give the command again")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # no JSON, or torn inside a character
        return False
    return True
