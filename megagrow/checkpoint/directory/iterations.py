"""Iteration directories and the tracker: what is published, what may be trusted, what goes.

    <save>/iter_0000100/                        a whole checkpoint; appears by one rename, never grows
    <save>/latest_checkpointed_iteration.txt    the tracker, written after it, by one rename
    <save>/.iter_0000100.staging-*              being written; whatever lies here was killed and is swept away
    <save>/.iter_0000100.converting/            being converted; the same command goes on with it
    <save>/iter_0000100.refused                 set aside: it failed its checks

Beside Megatron's files a checkpoint has `megagrow.json` (`Manifest`: what it is) and `integrity.json` (the sha256
and size of every file).
"""

import errno
import os
import re
import shutil
import uuid
from pathlib import Path

from megagrow.atomic import sync_directory, write_whole
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER

_ITERATION = re.compile(r"^iter_(\d{7,})$")


def iteration_path(save: Path, iteration: int) -> Path:
    """Directory of an iteration's checkpoint."""
    return save / f"iter_{iteration:07d}"


def published(save: Path) -> list[int]:
    """Published iterations, oldest first."""
    names = [_ITERATION.match(entry.name) for entry in save.iterdir()] if save.is_dir() else []
    return sorted(int(match[1]) for match in names if match)


def read_tracker(save: Path) -> int | None:
    """The tracker's iteration; None in a directory without checkpoints.

    Raises:
        CheckpointError: there are iterations but no readable tracker: training must not silently start anew.
    """
    file = save / TRACKER
    if file.is_file():
        text = file.read_text(errors="replace").strip()
        if text.isdecimal():
            return int(text)
        raise CheckpointError(
            f"{file}: holds {text!r}, not an iteration; write the newest of {published(save)} into it"
        )
    if found := published(save):
        raise CheckpointError(
            f"{save}: has iterations {found} but no {TRACKER}; write the one to go on from into that file"
        )
    return None


def write_tracker(save: Path, iteration: int) -> None:
    """Point the tracker at an iteration, by one rename."""
    write_whole(save / TRACKER, str(iteration))


def new_staging(final: Path) -> Path:
    """Make an empty staging directory for a checkpoint."""
    staging = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    return staging


def conversion_staging(final: Path) -> Path:
    """Where a conversion into a checkpoint is written: always the same place, so that a killed one can go on."""
    return final.parent / f".{final.name}.converting"


def publish(staging: Path, final: Path, *, replace: bool = False) -> None:
    """Turn a whole staging directory into the checkpoint, by one rename.

    Args:
        staging: where it was written.
        final: where it shall be.
        replace: put it in the place of one that is there (a run that does steps again); else CheckpointError.
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
            raise CheckpointError(f"{final}: there is a checkpoint already; it is not touched") from None
        raise
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # last, for it takes long, and meanwhile the new one is there


def sweep(save: Path) -> None:
    """Remove what killed writers left in staging."""
    for entry in save.glob(".iter_*.staging-*") if save.is_dir() else ():
        shutil.rmtree(entry, ignore_errors=True)


def retain(save: Path, keep: int) -> None:
    """Remove all but the `keep` newest iterations; a directory is first renamed, so that none is ever half there."""
    for iteration in published(save)[:-keep]:
        _remove(iteration_path(save, iteration))


def _remove(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.staging-{uuid.uuid4().hex[:8]}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
