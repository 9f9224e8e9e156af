"""Recovery from damage: finds the newest whole checkpoint, and sets damaged ones aside."""

import os
import shutil
from pathlib import Path

from megagrow.checkpoint.directory.integrity import check
from megagrow.checkpoint.directory.iterations import iteration_path, published, read_tracker, write_tracker
from megagrow.errors import CheckpointError
from megagrow.log import get
from megagrow.tracker import TRACKER

_log = get("checkpoint")


def newest_whole(save: Path, *, contents: bool = True) -> Path | None:
    """Return the newest checkpoint up to the tracker that passes `check`; set failing ones aside with a warning.

    Raises:
        CheckpointError: there are iterations but no tracker, or none of them is whole.
    """
    latest = read_tracker(save)
    if latest is None:
        return None
    candidates = [iteration for iteration in published(save) if iteration <= latest]
    for iteration in reversed(candidates):
        path = iteration_path(save, iteration)
        try:
            check(path, contents=contents)
            return path
        except CheckpointError as error:
            _log.warning("%s; set aside, trying the previous one", error)
            set_aside(path)
    raise CheckpointError(
        f"{save}: {TRACKER} names {latest}, but no whole checkpoint is left; restore one from a backup"
    )


def fall_back(save: Path) -> int | None:
    """Set the tracker to the newest whole checkpoint, set the damaged ones after it aside, and return its iteration.

    Returns None, and changes nothing, if the tracker's checkpoint is whole, or if none is.
    """
    damaged: list[Path] = []
    for iteration in reversed([number for number in published(save) if number <= (read_tracker(save) or 0)]):
        path = iteration_path(save, iteration)
        try:
            check(path)
        except CheckpointError:
            damaged.append(path)
            continue
        if iteration == read_tracker(save):
            return None
        for each in damaged:
            set_aside(each)
        write_tracker(save, iteration)
        return iteration
    return None


def set_aside(path: Path) -> None:
    """Rename a refused checkpoint, so that it is kept for inspection but not used."""
    target = path.with_name(path.name + ".refused")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(path, target)
