"""Going back: finds the newest whole checkpoint, and sets aside damaged ones and what is ahead of the tracker."""

import os
import shutil
import uuid
from pathlib import Path

from megagrow.checkpoint.directory.integrity import check
from megagrow.checkpoint.directory.iterations import iteration_path, published, read_tracker, write_tracker
from megagrow.config.paths import AHEAD
from megagrow.errors import CheckpointError
from megagrow.files.atomic import sync_directory
from megagrow.log import get
from megagrow.tracker import TRACKER

_log = get("checkpoint")


def newest_whole(save: Path, *, contents: bool = True) -> Path | None:
    """Return the newest checkpoint up to the tracker that passes `check`; set failing ones aside with a warning.

    What is ahead of the tracker is not looked at; `go_back` sets it aside.

    Raises:
        CheckpointError: there are several iterations but no tracker, or none up to the tracker is whole.
    """
    latest = _tracked(save)
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
    ahead = [iteration for iteration in published(save) if iteration > latest]
    or_choose = f", or write one of {ahead} into that file" if ahead else ""
    raise CheckpointError(
        f"{save}: {TRACKER} names {latest}, but no whole checkpoint is left; restore one from a backup{or_choose}"
    )


def go_back(save: Path, iteration: int) -> None:
    """Let training go on from an iteration: set the tracker to it, and set aside what is ahead of it.

    Called at every start; usually there is nothing to do. If a kill interrupts it, the next start completes it.

    Raises:
        CheckpointError: the directory cannot be written; every checkpoint is still there.
    """
    tracked = read_tracker(save) if (save / TRACKER).is_file() else None
    try:
        if tracked != iteration:
            if tracked is not None:
                _log.warning("%s named %d, and is set to %d, from which training goes on", TRACKER, tracked, iteration)
            write_tracker(save, iteration)
        set_ahead_aside(save, iteration)
    except OSError as error:
        raise CheckpointError(f"{save}: {error.strerror}; cannot go on from iteration {iteration} here") from None


def set_ahead_aside(save: Path, iteration: int) -> None:
    """Rename all that is published ahead of an iteration into `<save>/ahead`, which replaces an older `ahead`.

    An interrupted run leaves `.ahead.moving`, to which the next run adds the rest, so that no part of it counts as an
    older one.
    """
    ahead = [number for number in published(save) if number > iteration]
    moving, aside = save / f".{AHEAD}.moving", save / AHEAD
    if ahead:
        moving.mkdir(exist_ok=True)
    for number in ahead:
        shutil.rmtree(iteration_path(moving, number), ignore_errors=True)
        os.rename(iteration_path(save, number), iteration_path(moving, number))
    if not moving.is_dir():
        return
    older = save / f".iter_{AHEAD}.staging-{uuid.uuid4().hex[:8]}"  # a name that `sweep` removes
    if aside.exists():
        os.rename(aside, older)
    os.rename(moving, aside)
    sync_directory(save)
    _log.warning(
        "iterations %s were ahead of iteration %d, from which training goes on: renamed to %s%s",
        published(aside), iteration, aside, ", where older ones are removed" if older.exists() else "",
    )  # fmt: skip
    shutil.rmtree(older, ignore_errors=True)


def _tracked(save: Path) -> int | None:
    """Like `read_tracker`, but a lone iteration needs no tracker: a kill came before its first tracker was written."""
    found = published(save)
    return found[0] if len(found) == 1 and not (save / TRACKER).is_file() else read_tracker(save)


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
