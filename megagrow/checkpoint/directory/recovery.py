"""After damage: which checkpoint can be trusted, and what happens to those that cannot."""

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
    """The newest checkpoint, by the tracker, that passes `check`; failing ones are set aside with a warning.

    Raises:
        CheckpointError: iterations without a tracker, or none that is whole.
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
            _log.warning("%s; set aside, trying the one before", error)
            set_aside(path)
    raise CheckpointError(f"{save}: {TRACKER} says {latest}, but no whole checkpoint is left; restore one from a copy")


def fall_back(save: Path) -> int | None:
    """Point the tracker to the newest checkpoint that is whole, set the damaged ones after it aside, and return it.

    None where all is well, and where none that is whole is left: then nothing is touched.
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
    """Rename a refused checkpoint out of the way, keeping it for a person to look at."""
    target = path.with_name(path.name + ".refused")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(path, target)
