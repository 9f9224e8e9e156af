"""Makes the files of a run, then finishes and publishes the target exactly once, whichever process is first.

Shared by conversions into every format. The target does not exist before its last rename. Until then it is written
into a hidden directory with a journal, where a killed run is resumed and where several processes work together.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from megagrow.checkpoint.directory import iterations
from megagrow.convert.work import (
    CHECKED,
    FINISH,
    ConversionRun,
    Journal,
    allowed_piece_values,
    check_alone,
    is_disk_full,
    make_files,
    publish_target,
)
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER

_POLL_SECONDS = 0.5
Finished = TypeVar("Finished")


def make_and_publish(run: ConversionRun, finish: Callable[[], Finished]) -> Finished | None:
    """Make all files of an order, together with other processes, and publish the target.

    Args:
        run: the order, and how it is carried out.
        finish: writes everything that is not in a unit into the staging directory. It is called once all units are
            done, by the process that publishes.

    Returns:
        The result of `finish`, or None if another process has published the target.

    Raises:
        CheckpointError: there is too little memory or disk space, the source has changed, or another order was
            started in the same place.
    """
    staging, final = run.staging, run.final
    check_alone(run)
    allowed_piece_values(run.options, run.rank)
    if run.options.restart:
        shutil.rmtree(staging, ignore_errors=True)
    is_new = not staging.is_dir()
    missing = [each for each in final.parents if not each.exists()]
    try:
        return _make_and_publish(run, finish, is_new)
    except BaseException:
        for each in missing:  # those that are still empty
            with suppress(OSError):
                each.rmdir()
        raise


def _make_and_publish(run: ConversionRun, finish: Callable[[], Finished], is_new: bool) -> Finished | None:
    """Like `make_and_publish`, which removes the directories above the target that stay empty after an error."""
    staging, final = run.staging, run.final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if not make_files(run):
            return None
        if run.has_checked:
            Journal(staging).mark(CHECKED)
        return _finish_or_wait(run, finish)
    except FileNotFoundError:
        if staging.is_dir() and (run.is_alone or not final.exists()):
            raise
        if not final.exists():
            raise CheckpointError(f"{staging}: removed while it was being written") from None
        return None
    except OSError as error:
        if not is_disk_full(error):
            raise
        if not run.is_alone:  # other ranks may still be writing there
            raise CheckpointError(
                f"{final.parent}: the disk is full; make room, and run the same command again"
            ) from None
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"{final.parent}: the disk is full; nothing of the new checkpoint is kept") from None
    except CheckpointError:
        if run.is_alone and is_new and not _has_finished_units(run):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _finish_or_wait(run: ConversionRun, finish: Callable[[], Finished]) -> Finished | None:
    """Finish and publish the target, or wait until another process has; then return None."""
    while not run.final.exists() or run.options.overwrite:
        journal = Journal(run.staging)
        with journal.alive():
            if journal.claim(FINISH):
                result = finish()
                if journal.holds(FINISH):
                    publish_target(run.staging, run.final, replace=run.options.overwrite)
                    _write_tracker(run)
                    return result
        time.sleep(_POLL_SECONDS)
    return None


def _write_tracker(run: ConversionRun) -> None:
    if run.tracker is None:
        return
    try:
        iterations.write_tracker(run.final.parent, run.tracker)
    except OSError as error:
        raise CheckpointError(
            f"{run.final}: is complete, but {TRACKER} next to it cannot be written: {error.strerror}; cure that, and "
            "run the same command again"
        ) from None


def _has_finished_units(run: ConversionRun) -> bool:
    """Whether the staging directory holds anything worth keeping."""
    return run.staging.is_dir() and bool(Journal(run.staging).finished_units())
