"""Makes the files of a planned conversion in its staging directory: journal, disk space, workers, progress.

The same for every format: the `PlannedTarget` determines what is made, and `run` finishes and publishes it.
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
from megagrow.convert.early import Warmup
from megagrow.convert.plan import SOURCE_FILES, FileState, Order, changed_files, file_states, same_settings
from megagrow.convert.targets import PlannedTarget, plan_target
from megagrow.convert.work.disk import check_space
from megagrow.convert.work.journal import DIRECTORY, SKIPPED, Journal
from megagrow.convert.work.memory import DEFAULT_MEMORY, piece_values
from megagrow.convert.work.rank import WorkerRank
from megagrow.convert.work.worker import take_part
from megagrow.errors import CheckpointError
from megagrow.records import Compared

_PROGRESS_SECONDS = 0.5

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True)
class RunOptions:
    """How a conversion is carried out. Only `sha256` affects the values written, and of those only integrity.json.

    Attributes:
        contents: compare the source's files with their hashes first, in one pass, where it has no checksums of blocks.
        checksums: compare the source's checksums at all; those of blocks are compared while it is read.
        allow_non_finite: carry NaN and infinite values over, and count them, instead of refusing them.
        workers: processes on this machine.
        memory: bytes that all workers on this machine may use together.
        sha256: use sha256 in integrity.json, as newer Megatron does, instead of a faster hash.
        overwrite: replace an existing target, once the new one is whole.
        restart: throw away what an interrupted conversion has written.
        warmup: worker processes and read-ahead that were started earlier; they end with the conversion.
    """

    contents: bool = True
    checksums: bool = True
    allow_non_finite: bool = False
    workers: int = 1
    memory: int = DEFAULT_MEMORY
    sha256: bool = False
    overwrite: bool = False
    restart: bool = False
    warmup: Warmup | None = None


@dataclass(frozen=True, eq=False)
class ConversionRun:
    """The run of one order by this process, alone or as one of several ranks.

    Attributes:
        order: the conversion.
        opened: its source.
        final: the directory that the target is published as.
        options: workers, memory, and how to treat existing files.
        rank: this process among those that were started for the same order.
        progress: called about twice a second.
        source_files: the source's `file_states` before it was opened and checked.
        compared: how the source's checksums are compared.
        tracker: iteration to write into the tracker after publication; None leaves the tracker alone.
    """

    order: Order
    opened: OpenCheckpoint
    final: Path
    options: RunOptions
    rank: WorkerRank
    progress: Progress
    source_files: Mapping[str, FileState]
    compared: Compared = "none"
    tracker: int | None = None

    @property
    def staging(self) -> Path:
        """The directory that the target is written into; it is the same for every run of the order."""
        return iterations.conversion_staging(self.final)

    @property
    def has_checked(self) -> bool:
        """Whether this process has compared the hashes of the source's files."""
        return self.compared == "files" and self.rank.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether no other rank was started for the order."""
        return self.rank.count == 1


def make_files(run: ConversionRun) -> bool:
    """Make all data files of an order, together with other processes.

    Files that an earlier run of the same order has finished are kept.

    Returns:
        False if other processes had already published the target when this one was about to start.

    Raises:
        CheckpointError: there is too little disk space or memory, or another order was started in the same place.
    """
    order, options, staging, journal = run.order, run.options, run.staging, Journal(run.staging)
    target = plan_target(order, run.opened, lambda: allowed_piece_values(options, run.rank), options.allow_non_finite)
    sizes = [sum(file.size for file in unit) for unit in target.units]
    staging.mkdir(parents=True, exist_ok=True)
    is_resumed = journal.begin(order.identity(run.source_files), same_settings)
    if run.final.exists() and not options.overwrite:
        if not is_resumed:  # the others have renamed their staging directory, and this is a new, empty one
            shutil.rmtree(staging, ignore_errors=True)
        return False
    if is_resumed:
        _check_unchanged(order, journal)
    if run.compared == "skipped":
        journal.mark(SKIPPED)
    done = journal.finished_units()
    left = sum(size for unit, size in enumerate(sizes) if unit not in done)
    if run.rank.rank == 0:
        check_space(staging, left - _allocated(staging, target, done))
    with options.warmup or Warmup(options.workers if left else 1) as warmup:
        warmup.start_work(
            staging, options.memory, checksums=options.checksums, allow_non_finite=options.allow_non_finite
        )
        with _reporting(journal, sum(sizes) - left, sum(sizes), run.progress):
            take_part(order, target, staging, journal, run.rank)
    return True


def allowed_piece_values(options: RunOptions, rank: WorkerRank) -> int:
    """The number of values in a piece that the allowed memory permits; CheckpointError if that is too few."""
    return piece_values(options.memory, max(options.workers, rank.on_node))


def check_alone(run: ConversionRun) -> None:
    """Raise CheckpointError if several ranks have an option that only a single process can carry out."""
    for flag, old in (("overwrite", run.final), ("restart", run.staging)):
        if not run.is_alone and getattr(run.options, flag):
            raise CheckpointError(f"--{flag}: {run.rank.count} ranks cannot agree on what is old; remove {old} first")


def checked_files(run: ConversionRun) -> dict[str, Any]:
    """Size and hash of every data file that was made, by name.

    Raises:
        CheckpointError: the source has changed since the conversion was started, or a file is missing or incomplete.
    """
    journal = Journal(run.staging)
    _check_unchanged(run.order, journal)
    files: dict[str, Any] = {}
    for written in journal.finished().values():
        files |= written
    for name, known in files.items():
        file = run.staging / name
        size = file.stat().st_size if file.is_file() else None
        if size != known["size"]:
            found = "missing" if size is None else f"{size} bytes"
            raise CheckpointError(f"{file}: {found}, {known['size']} bytes were written; --restart starts again")
    return files


def _check_unchanged(order: Order, journal: Journal) -> None:
    before, now = journal.plan().get(SOURCE_FILES, {}), file_states(order.source)
    if changed := changed_files(before, now):
        names = ", ".join(f"{name} is gone" if name not in now else name for name in changed[:3])
        raise CheckpointError(
            f"{order.source}: changed while it was converted ({names}); nothing was published; "
            "--restart starts again (new names, links and permissions of a file count as changes too)"
        )


def publish_target(staging: Path, final: Path, *, replace: bool) -> None:
    """Publish a whole target. Its journal moves with it, so that one of the two directories always has all of it."""
    iterations.publish(staging, final, replace=replace)
    drop_journal(final)


def drop_journal(final: Path) -> None:
    """Remove the journal from a target, if it has one: first by one rename, then file by file."""
    doomed = final.with_name(f".{final.name}.staging-journal")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(final / DIRECTORY, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _allocated(staging: Path, target: PlannedTarget, done: set[int]) -> int:
    """Bytes that unfinished units already occupy on the disk; they will be written again in place."""
    files = [staging / file.name for unit, planned in enumerate(target.units) if unit not in done for file in planned]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


@contextmanager
def _reporting(journal: Journal, before: int, total: int, progress: Progress) -> Iterator[None]:
    """Report the progress of all workers while the block runs."""
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(_PROGRESS_SECONDS):
            progress(min(before + journal.reported_bytes(), total), total)

    reporter = threading.Thread(target=report, name="progress", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        stop.set()
        reporter.join()
        progress(total, total)
