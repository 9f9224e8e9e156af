"""What a conversion would read, write and take, found out without writing more than a probe."""

import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from megagrow.convert.run.convert import TargetSpec, plan_target_files
from megagrow.convert.work import piece_values

_PROBE_BYTES = 64 << 20
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Forecast:
    """What a conversion would do.

    Attributes:
        rate: bytes a second, read and written together, that this disk just did.
        free: bytes on the target's file system.
        piece_values: values that a worker holds at a time.
    """

    operators: str
    exact: bool
    tensors: int
    chunks: int
    units: int
    files: int
    largest_file: int
    bytes_read: int
    bytes_written: int
    memory: int
    piece_values: int
    free: int
    rate: float
    seconds: float


def forecast(source: Path, save: Path, target: TargetSpec, workers: int, memory: int) -> Forecast:
    """Plan a conversion and measure the disk.

    Raises:
        CheckpointError: it cannot be done, with what would do.
        GrowthError: an operator cannot do the step.
    """
    job, production = plan_target_files(source, target)
    values = piece_values(memory, workers)
    files = [file.size for unit in production.units for file in unit]
    where = next(path for path in (save, *save.absolute().parents) if path.is_dir())
    sample = next((entry for entry in sorted(source.rglob("*"), key=_size, reverse=True) if entry.is_file()), None)
    rate = measure_rate(where, sample)
    moved = job.conversion.bytes_read + sum(files)
    return Forecast(
        operators=", ".join(f"{axis} {name}" for axis, name in job.step.operators.items()),
        exact=job.step.exact,
        tensors=len(job.conversion.tasks),
        chunks=sum(1 for _ in production.chunks),
        units=len(production.units),
        files=len(files),
        largest_file=max(files),
        bytes_read=job.conversion.bytes_read,
        bytes_written=sum(files),
        memory=memory,
        piece_values=values,
        free=shutil.disk_usage(where).free,
        rate=rate,
        seconds=moved / rate,
    )


def measure_rate(where: Path, sample: Path | None) -> float:
    """Bytes a second of reading the beginning of a file and writing as much into a directory, to the disk."""
    probe = where / f".probe-{uuid.uuid4().hex[:8]}"
    moved, begun = 0, time.perf_counter()
    try:
        with open(probe, "wb") as out, open(sample or os.devnull, "rb") as stream:
            while moved < 2 * _PROBE_BYTES:
                block = stream.read(_BLOCK) or bytes(_BLOCK)
                out.write(block)
                moved += 2 * len(block)
            out.flush()
            os.fdatasync(out.fileno())
        return moved / (time.perf_counter() - begun)
    finally:
        probe.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
