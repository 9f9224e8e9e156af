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
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from megagrow.checkpoint.manifest import FILE as MANIFEST
from megagrow.checkpoint.torch_dist import check_format
from megagrow.errors import CheckpointError
from megagrow.log import get
from megagrow.tracker import TRACKER

INTEGRITY = "integrity.json"
_ALGORITHMS: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
_ITERATION = re.compile(r"^iter_(\d{7,})$")
_log = get("checkpoint")


def iteration_path(save: Path, iteration: int) -> Path:
    """Directory of an iteration's checkpoint."""
    return save / f"iter_{iteration:07d}"


def iterations(save: Path) -> list[int]:
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
            f"{file}: holds {text!r}, not an iteration; write the newest of {iterations(save)} into it"
        )
    if found := iterations(save):
        raise CheckpointError(
            f"{save}: has iterations {found} but no {TRACKER}; write the one to go on from into that file"
        )
    return None


def write_tracker(save: Path, iteration: int) -> None:
    """Point the tracker at an iteration, by one rename."""
    temporary = save / f".{TRACKER}.tmp"
    temporary.write_text(str(iteration))
    os.replace(temporary, save / TRACKER)


def stage(final: Path) -> Path:
    """Make an empty staging directory for a checkpoint."""
    staging = final.parent / f".{final.name}.staging-{uuid.uuid4().hex[:8]}"
    staging.mkdir(parents=True)
    return staging


def resumable(final: Path) -> Path:
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
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # last, for it takes long, and meanwhile the new one is there


def sweep(save: Path) -> None:
    """Remove what killed writers left in staging."""
    for entry in save.glob(".iter_*.staging-*") if save.is_dir() else ():
        shutil.rmtree(entry, ignore_errors=True)


def retain(save: Path, keep: int) -> None:
    """Remove all but the `keep` newest iterations; a directory is first renamed, so that none is ever half there."""
    for iteration in iterations(save)[:-keep]:
        _remove(iteration_path(save, iteration))


def seal(path: Path, known: Mapping[str, Mapping[str, Any]] | None = None, algorithm: str = "sha256") -> None:
    """Write the hash and size of every file of a finished checkpoint into integrity.json.

    Args:
        path: the (staging) directory.
        known: by file name, `size` and hashes by algorithm that were computed while it was written.
        algorithm: of the hashes: sha256, as newer Megatron has it, or xxh3_128, which is faster.
    """
    told = dict(known or {})
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file() and entry.name != INTEGRITY)
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(
            lambda name: told[name][algorithm] if name in told else _digest(path / name, algorithm), files
        )
        entries = {
            name: {"size": (path / name).stat().st_size, algorithm: digest}
            for name, digest in zip(files, digests, strict=True)
        }
    (path / INTEGRITY).write_text(json.dumps({"algorithm": algorithm, "files": entries}, indent=1))


def fingerprint(path: Path) -> str:
    """One sha256 for a whole checkpoint, from its integrity.json; empty where it has none."""
    file = path / INTEGRITY
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def check(path: Path, *, contents: bool = True) -> None:
    """Raise CheckpointError, with the file's name, unless the checkpoint is whole.

    Args:
        path: an iteration directory.
        contents: compare checksums too, not only names and sizes.
    """
    check_format(path)
    file = path / INTEGRITY
    if not file.is_file():
        if (path / MANIFEST).is_file():
            raise CheckpointError(f"{path}: {INTEGRITY} is missing: its writer never finished, or somebody removed it")
        return  # written by Megatron itself: the format's own files are all there is to go by
    try:
        content = json.loads(file.read_text())
        algorithm = content["algorithm"]
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm {algorithm!r}")
        expected = {str(name): _entry(entry, algorithm) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from None
    for name, (size, _) in expected.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if (found := (path / name).stat().st_size) != size and size is not None:
            raise CheckpointError(f"{path / name}: {found} bytes, {size} were written")
    if contents:
        _check_digests(path, expected, algorithm)


def newest_whole(save: Path, *, contents: bool = True) -> Path | None:
    """The newest checkpoint, by the tracker, that passes `check`; failing ones are set aside with a warning.

    Raises:
        CheckpointError: iterations without a tracker, or none that is whole.
    """
    latest = read_tracker(save)
    if latest is None:
        return None
    candidates = [iteration for iteration in iterations(save) if iteration <= latest]
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
    for iteration in reversed([number for number in iterations(save) if number <= (read_tracker(save) or 0)]):
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


def _entry(told: Any, algorithm: str) -> tuple[int | None, str]:
    """Size and hash of a file; newer Megatron gives the hash alone."""
    return (None, told) if isinstance(told, str) else (int(told["size"]), str(told[algorithm]))


def _check_digests(path: Path, expected: dict[str, tuple[int | None, str]], algorithm: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        digests: Iterable[str] = pool.map(lambda name: _digest(path / name, algorithm), expected)
        for (name, (_, wanted)), found in zip(expected.items(), digests, strict=True):
            if found != wanted:
                raise CheckpointError(f"{path / name}: damaged: its {algorithm} is not the one that was written")


def _remove(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.staging-{uuid.uuid4().hex[:8]}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _digest(file: Path, algorithm: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, _ALGORITHMS[algorithm]).hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
