"""Iteration directories and the tracker: how a checkpoint is staged, published and removed.

    <save>/iter_0000100/                        a whole checkpoint; appears by one rename, and never changes
    <save>/latest_checkpointed_iteration.txt    the tracker, written afterwards, by one rename
    <save>/.iter_0000100.staging-*              being written, or left by a killed writer, and then removed
    <save>/.iter_0000100.converting/            being converted; the same command resumes it
    <save>/iter_0000100.refused                 set aside because it failed its checks
    <save>/ahead/iter_0000100                   set aside because training went back behind it

Next to Megatron's files a checkpoint has `megagrow.json` (`Manifest`, its description) and `integrity.json` (the
hash and size of every file).
"""

import errno
import os
import re
import shutil
import uuid
from pathlib import Path

from megagrow.errors import CheckpointError
from megagrow.files.atomic import sync_directory, write_atomically
from megagrow.files.bounded import read_small
from megagrow.tracker import MAX_TRACKER, TRACKER, iteration_in

_ITERATION = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,})")
"""The names that `iteration_path` makes, and no other spelling of the same number."""


def iteration_path(save: Path, iteration: int) -> Path:
    """Return the directory of an iteration's checkpoint."""
    return save / f"iter_{iteration:07d}"


def published(save: Path) -> list[int]:
    """Return the published iterations, oldest first."""
    names = [_ITERATION.fullmatch(entry.name) for entry in save.iterdir()] if save.is_dir() else []
    return sorted(int(match[1]) for match in names if match)


def read_tracker(save: Path) -> int | None:
    """Return the tracker's iteration; None in a directory without checkpoints.

    Raises:
        CheckpointError: there are iterations but no readable tracker; training must not silently start from scratch.
    """
    file = save / TRACKER
    if file.is_file():
        text = read_small(file, end=MAX_TRACKER).decode(errors="replace").strip()
        if (iteration := iteration_in(text)) is not None:
            return iteration
        raise CheckpointError(
            f"{file}: contains {text!r:.50}, not an iteration; write the newest of {published(save)} into it"
        )
    if found := published(save):
        raise CheckpointError(
            f"{save}: has iterations {found} but no {TRACKER}; write the one to resume from into that file"
        )
    return None


def write_tracker(save: Path, iteration: int) -> None:
    """Set the tracker to an iteration, by one rename."""
    write_atomically(save / TRACKER, str(iteration))


def new_staging(final: Path) -> Path:
    """Create an empty staging directory for a checkpoint."""
    staging = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    return staging


def conversion_staging(final: Path) -> Path:
    """Return the staging directory of a conversion: always the same one, so that a killed conversion can resume."""
    return final.parent / f".{final.name}.converting"


def publish(staging: Path, final: Path, *, replace: bool = False) -> None:
    """Turn a complete staging directory into the checkpoint, by one rename.

    Args:
        staging: the directory in which it was written.
        final: the checkpoint's directory.
        replace: replace an existing checkpoint (in a run that repeats steps) instead of raising CheckpointError.
    """
    old = final.with_name(f".{final.name}.staging-{uuid.uuid4().hex[:8]}")
    if replace and final.exists() and staging.is_dir():
        os.rename(final, old)
    try:
        os.rename(staging, final)
    except OSError as error:
        if old.exists():
            os.rename(old, final)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointError(f"{final}: a checkpoint already exists; it is not changed") from None
        raise
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # last, because it is slow, and the new checkpoint already exists


def sweep(save: Path) -> None:
    """Remove the staging directories that killed writers left."""
    for entry in save.glob(".iter_*.staging-*") if save.is_dir() else ():
        shutil.rmtree(entry, ignore_errors=True)


def retain(save: Path, keep: int) -> None:
    """Remove all but the `keep` newest iterations up to the tracker; the one that it names is the newest of them.

    What is ahead of the tracker is neither counted nor removed: training does not continue from it. Each iteration
    is renamed first, so that none is ever partly there.

    Raises:
        CheckpointError: there are iterations but no readable tracker; nothing is removed.
    """
    latest = read_tracker(save)
    passed = [iteration for iteration in published(save) if latest is not None and iteration <= latest]
    for iteration in passed[:-keep]:
        _remove(iteration_path(save, iteration))


def _remove(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.staging-{uuid.uuid4().hex[:8]}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
