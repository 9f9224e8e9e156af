"""Carry a planned conversion out in its staging directory: journal, room on the disk, workers, and word of progress.

The same for every kind of target: what is made is the affair of its `PlannedTarget`, and what is published that of
whoever calls this.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.convert.early import Readahead, WorkerPool
from megagrow.convert.plan import Order, file_states
from megagrow.convert.targets import PlannedTarget, plan_target
from megagrow.convert.work.disk import check_space
from megagrow.convert.work.journal import DIRECTORY, Journal
from megagrow.convert.work.memory import DEFAULT_MEMORY, piece_values
from megagrow.convert.work.place import WorkerRank
from megagrow.convert.work.worker import take_part
from megagrow.errors import CheckpointError

_TELL_EVERY = 0.5


@dataclass(frozen=True)
class RunOptions:
    """How a conversion is carried out; none of this changes a byte of the result, but for `sha256` integrity.json.

    Attributes:
        contents: compare the source's checksums first.
        workers: processes on this machine.
        memory: bytes that all workers of this machine together may take.
        sha256: of the files in integrity.json, as newer Megatron has it; else a faster hash.
        overwrite: replace a target that is there, once the new one is whole.
        restart: throw away what an interrupted conversion has written.
        crew: the other processes on this machine, where they were started before; ended with the conversion.
        ahead: what reads the source ahead, where that was begun before.
    """

    contents: bool = True
    workers: int = 1
    memory: int = DEFAULT_MEMORY
    sha256: bool = False
    overwrite: bool = False
    restart: bool = False
    crew: WorkerPool | None = None
    ahead: Readahead | None = None


Progress = Callable[[int, int], None]


def make_files(
    order: Order,
    opened: OpenCheckpoint,
    staging: Path,
    final: Path,
    how: RunOptions,
    here: WorkerRank,
    progress: Progress,
) -> bool:
    """Make all data files of an order, with others; False if those have published it before this process could begin.

    Args:
        order: what is to be made.
        opened: its source.
        staging: where; what is there of the same order is gone on with.
        final: where it will be published.
        how: workers and memory.
        here: this process among those that were started for the same order.
        progress: told (bytes written, bytes in all).

    Raises:
        CheckpointError: there is too little room or memory, or something else was begun in `staging`.
    """
    journal = Journal(staging)
    production = plan_target(order, opened, lambda: allowed_piece_values(how, here))
    sizes = [sum(file.size for file in unit) for unit in production.units]
    staging.mkdir(parents=True, exist_ok=True)
    resumed = journal.begin(order.identity())
    if final.exists() and not how.overwrite:
        if not resumed:  # they took the staging directory away, and this is another one
            shutil.rmtree(staging, ignore_errors=True)
        return False
    done = journal.finished_units()
    left = sum(size for unit, size in enumerate(sizes) if unit not in done)
    if here.rank == 0:
        check_space(staging, left - _allocated(staging, production, done))
    crew = how.crew or WorkerPool(how.workers - 1 if left else 0)
    if how.ahead is not None:
        how.ahead.work_begins()
    try:
        crew.begin(staging, how.memory)
        with _telling(journal, sum(sizes) - left, sum(sizes), progress):
            take_part(order, production, staging, journal, here)
    finally:
        crew.end()
    return True


def allowed_piece_values(how: RunOptions, here: WorkerRank) -> int:
    """Values of a piece in the memory that is allowed; CheckpointError where that is too little."""
    return piece_values(how.memory, max(how.workers, here.on_node))


def check_unchanged(order: Order, journal: Journal) -> None:
    """Raise CheckpointError if the source is not what it was when the conversion began."""
    plan_target: dict[str, str] = journal.plan()["source files"]
    if (now := file_states(order.source)) != plan_target:
        changed = sorted(name for name, told in now.items() if plan_target.get(name) != told)
        raise CheckpointError(
            f"{order.source}: changed while it was converted ({', '.join(changed[:3]) or 'files are gone'}); "
            "nothing is published; --restart begins again"
        )


def check_made(staging: Path, told: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless all files that the journal tells of are still there."""
    for name, known in told.items():
        file = staging / name
        size = file.stat().st_size if file.is_file() else None
        if size != known["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise CheckpointError(f"{file}: {found}, {known['size']} bytes were written; --restart begins again")


def check_alone(how: RunOptions, here: WorkerRank, final: Path) -> None:
    """Raise CheckpointError where several ranks were asked for what only one can do."""
    for flag, old in (("overwrite", final), ("restart", iterations.conversion_staging(final))):
        if here.count > 1 and getattr(how, flag):
            raise CheckpointError(f"--{flag}: {here.count} ranks cannot agree on what is old; remove {old} first")


def publish_target(staging: Path, final: Path, *, replace: bool) -> None:
    """Publish what is whole, its journal with it, so that at any moment the one or the other is there."""
    iterations.publish(staging, final, replace=replace)
    drop_journal(final)


def drop_journal(final: Path) -> None:
    """Take the journal, if it is there, out of a target by one rename, then remove it."""
    doomed = final.with_name(f".{final.name}.staging-journal")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(final / DIRECTORY, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _allocated(staging: Path, production: PlannedTarget, done: set[int]) -> int:
    """Bytes on the disk of units that are not finished: they are there already, and are written again in place."""
    files = [staging / file.name for unit, named in enumerate(production.units) if unit not in done for file in named]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


@contextmanager
def _telling(journal: Journal, before: int, total: int, progress: Progress) -> Iterator[None]:
    """Tell a person how far all workers are, while the block runs."""
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(_TELL_EVERY):
            progress(min(before + journal.told_bytes(), total), total)

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join()
        progress(total, total)
