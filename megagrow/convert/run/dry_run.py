"""Forecasts what a conversion would read, write and need, without writing more than a probe."""

import os
import shutil
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megagrow.convert.plan import Recipe
from megagrow.convert.run.convert import plan_target_files
from megagrow.convert.run.target import TargetSpec, check_place
from megagrow.convert.work import piece_values

_PROBE_BYTES = 64 << 20
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Forecast:
    """What a conversion would do.

    Attributes:
        exact: whether the operators preserve the function, in real numbers.
        storage, rounded: what storing does to the values, and to how many tensors.
        copied, grown, fresh, zero: tensors by how their weights are made (see `Recipe`); `tensors` in all.
        piece_values: values that a worker holds at a time.
        free: free bytes on the target's file system.
        rate: bytes per second, read and written together, that this disk has just achieved.
        notes: what the user should know about the source.
    """

    operators: str
    exact: bool
    storage: str
    rounded: int
    tensors: int
    copied: int
    grown: int
    fresh: int
    zero: int
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
    notes: tuple[str, ...] = ()


def forecast(source: Path, save: Path, target: TargetSpec, workers: int, memory: int) -> Forecast:
    """Plan a conversion and measure the disk.

    Raises:
        CheckpointError: the conversion is not possible, with what would make it so.
        GrowthError: an operator cannot do the step.
    """
    check_place(save)
    prepared, planned = plan_target_files(source, target)
    conversion, recipes = prepared.conversion, Counter(task.recipe for task in prepared.conversion.tasks)
    values = piece_values(memory, workers)
    files = [file.size for unit in planned.units for file in unit]
    existing = next(path for path in (save, *save.absolute().parents) if path.is_dir())
    sample = next((entry for entry in sorted(source.rglob("*"), key=_size, reverse=True) if entry.is_file()), None)
    rate = measure_rate(existing, sample)
    moved = conversion.bytes_read + sum(files)
    return Forecast(
        operators=", ".join(f"{axis} {name}" for axis, name in prepared.step.operators.items()),
        exact=prepared.step.exact,
        storage=conversion.storage.words,
        rounded=conversion.storage.rounded,
        tensors=len(conversion.tasks),
        copied=recipes[Recipe.COPY],
        grown=recipes[Recipe.GROW],
        fresh=recipes[Recipe.FRESH],
        zero=recipes[Recipe.ZERO],
        chunks=sum(1 for _ in planned.chunks),
        units=len(planned.units),
        files=len(files),
        largest_file=max(files),
        bytes_read=conversion.bytes_read,
        bytes_written=sum(files),
        memory=memory,
        piece_values=values,
        free=shutil.disk_usage(existing).free,
        rate=rate,
        seconds=moved / rate,
        notes=prepared.notes,
    )


def measure_rate(directory: Path, sample: Path | None) -> float:
    """Bytes per second of reading the start of a file and writing the same amount to the disk, in a directory."""
    probe = directory / f".probe-{uuid.uuid4().hex[:8]}"
    moved, started = 0, time.perf_counter()
    try:
        with open(probe, "wb") as out, open(sample or os.devnull, "rb") as stream:
            while moved < 2 * _PROBE_BYTES:
                block = stream.read(_BLOCK) or bytes(_BLOCK)
                out.write(block)
                moved += 2 * len(block)
            out.flush()
            os.fdatasync(out.fileno())
        return moved / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
