"""Typed records: what happened, one JSON object a line, written as it happens.

Reports, `status` and tests read these files and never a log. A record is frozen and knows its `kind`. A file
survives `kill -9`: a half-written last line is dropped when it is read, and a resumed run first takes out
the steps that it is about to do again (`rewind`).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class Record(BaseModel):
    """Base of all records; `time` is seconds since the epoch (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)

    time: float


class StepRecord(Record):
    """One optimizer step. `iteration` counts from 1 within the stage, `consumed_*` over the whole family."""

    kind: Literal["step"] = "step"
    stage: str
    iteration: int
    loss: float
    grad_norm: float
    learning_rate: float
    consumed_samples: int
    consumed_tokens: int
    flops: float = Field(description="training FLOPs spent in this stage so far")
    tokens_per_second: float
    skipped: bool = False


class EvalRecord(Record):
    """Validation loss in nats per token after `iteration` steps of the stage (0: before the first)."""

    kind: Literal["eval"] = "eval"
    stage: str
    iteration: int
    loss: float
    samples: int
    consumed_tokens: int
    flops: float = Field(description="training FLOPs spent in this stage so far")


class StageRecord(Record):
    """A finished stage."""

    kind: Literal["stage"] = "stage"
    stage: str
    iterations: int
    parameters: int
    stage_tokens: int
    consumed_tokens: int
    flops: float
    first_loss: float | None
    final_loss: float
    checkpoint: str
    seconds: float = Field(description="wall seconds of the last process that trained the stage")


class ConversionRecord(Record):
    """A finished conversion from one checkpoint to the next."""

    kind: Literal["conversion"] = "conversion"
    source: str
    target: str
    operators: dict[str, str]
    moments: str
    exact: bool
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float


class JobRecord(Record):
    """A job of the family graph that started or ended."""

    kind: Literal["job"] = "job"
    job: str
    event: Literal["started", "finished", "failed", "interrupted"]
    detail: str = ""
    exit_code: int | None = None
    seconds: float | None = None


AnyRecord = Annotated[StepRecord | EvalRecord | StageRecord | ConversionRecord | JobRecord, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord, config=ConfigDict(defer_build=True))


def append(path: Path, record: Record) -> None:
    """Append one record as one line, in one write; a line torn by an earlier kill is closed off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
        torn = b"\n" if end and stream.read(1) != b"\n" else b""
        stream.write(torn + record.model_dump_json().encode() + b"\n")


def read(path: Path) -> Iterator[AnyRecord]:
    """Yield the records of a file in order; a missing file has none; a torn line is passed over."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            try:
                yield _ADAPTER.validate_json(line)
            except ValidationError:
                if line.endswith(b"\n") and _is_json(line):
                    raise


def rewind(path: Path, iteration: int) -> None:
    """Drop the records of a stage that lie after `iteration`: the steps a resumed run will do again."""
    if not path.exists():
        return
    kept = [r for r in read(path) if isinstance(r, JobRecord) or getattr(r, "iteration", 0) <= iteration]
    kept = [r for r in kept if not isinstance(r, StageRecord) or r.iterations <= iteration]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(r.model_dump_json() + "\n" for r in kept))
    os.replace(temporary, path)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
