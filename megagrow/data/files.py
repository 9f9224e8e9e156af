"""Finds the files of a source, always in the same order, and says which it passes over and why.

A path of a source is a file, a directory, a glob or the word `python-stdlib`; each is expanded to a sorted list of
files. Order matters because the split into train, validation and test is by documents, so nothing here depends on the
file system's own order.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from megagrow.config import DataSource
from megagrow.config.family import STDLIB
from megagrow.errors import DataError

WHOLE, LINES, TABLES = (".txt", ".md", ".py"), (".jsonl", ".json"), (".parquet",)
PACKED = (".gz", ".zst")
_KINDS = "a file is .txt .md .py .jsonl or .json, each also with .gz or .zst, or .parquet"
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_BLOCK = 2**22


class InputFile(NamedTuple):
    """A file of a source. A `lenient` one is skipped without an error if it is not UTF-8 (Python's own files)."""

    path: Path
    lenient: bool = False


@dataclass
class Listing:
    """The files of a source in order, each once; and why others were passed over: reason -> number and an example."""

    files: list[InputFile] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def pass_over(self, path: Path, reason: str) -> None:
        """Count a file or directory that is not read."""
        self.passed_over[reason] += 1
        # a name may contain what a terminal would obey
        self.examples.setdefault(reason, _printable(str(path)))


def list_files(source: DataSource) -> Listing:
    """Return the files of a source; DataError if a path is missing or has no usable file."""
    listing, paths, contents = Listing(), set[Path](), set[str]()
    for path in source.paths:
        own = path == STDLIB
        for file in _stdlib_files() if own else [InputFile(file) for file in _expand(path, source.name, listing)]:
            real = os.path.realpath(file.path)
            if file.path in paths:
                continue
            if real in contents:
                listing.pass_over(file.path, "another path of a file that is read")
            else:
                listing.files.append(file)
            paths.add(file.path)
            contents.add(real)
    return listing


def input_state(source: DataSource) -> dict[str, str]:
    """Return the state of a source's input as JSON-able sizes and times, to detect changes.

    Python's own sources are identified by Python's version, because their times differ between machines.
    """
    if source.prefix is not None:
        files = [Path(source.prefix + ending) for ending in (".bin", ".idx")]
    else:
        others = tuple(path for path in source.paths if path != STDLIB)
        files = [file.path for file in list_files(source.model_copy(update={"paths": others})).files]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DataError(f"source {source.name!r}: {missing} does not exist")
    state = {str(file): file_state(file) for file in files}
    if STDLIB in source.paths:
        state[STDLIB] = stdlib_state()
    return state


def stdlib_state() -> str:
    """Return what identifies Python's own sources."""
    return platform.python_version()


def file_state(file: Path) -> str:
    """Return the size of a file and the time of its last change, as text for comparison."""
    status = file.stat()
    return f"{status.st_size} bytes, mtime {status.st_mtime_ns}"


def checksum(file: Path) -> str:
    """Return a checksum of a file's content; DataError if it cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        with open(file, "rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _expand(path: str, source: str, listing: Listing) -> list[Path]:
    """Return the files of one entry of `paths`, sorted."""
    place = Path(path).expanduser()
    if place.is_file():
        if not is_known(place):
            raise DataError(f"source {source!r}: {path} has an unknown file type: {_KINDS}")
        return [place]
    if place.is_dir():
        found = _files_below(place, listing)
    else:
        matches = sorted(Path(match) for match in glob.glob(str(place), recursive=True))
        if not matches:
            raise DataError(f"source {source!r}: path {path!r} does not exist and matches nothing (from {Path.cwd()})")
        found = []
        for match in matches:
            found += _files_below(match, listing) if match.is_dir() else [match] * _takes(match, listing)
    if not found:
        raise DataError(f"source {source!r}: no text in {path}: {_KINDS}")
    return found


def _files_below(root: Path, listing: Listing) -> list[Path]:
    """Return files of known types under a directory, links to directories followed, sorted by their path.

    A directory is read once, under its own path rather than a link's, however many links lead to it.
    """
    above = {os.path.realpath(root), *map(str, Path(os.path.realpath(root)).parents)}
    visited, found = {os.path.realpath(root)}, list[Path]()
    pending = _walk(root, visited, found, listing)
    while pending:
        link = pending.pop(0)
        real = os.path.realpath(link)
        if real in above:
            listing.pass_over(link, "a link to a directory above it")
        elif real in visited:
            listing.pass_over(link, "a link to a directory that is read")
        else:
            visited.add(real)
            pending += _walk(link, visited, found, listing)
    return sorted(found)


def _walk(directory: Path, visited: set[str], found: list[Path], listing: Listing) -> list[Path]:
    """Add the files below a directory to `found`; return the links to directories in it, not followed."""
    links: list[Path] = []
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {error.strerror}") from None
    for entry in entries:
        path = directory / entry.name
        if entry.name.startswith("."):
            listing.pass_over(path, "hidden")
        elif not path.is_dir():
            if _takes(path, listing):
                found.append(path)
        elif entry.is_symlink():
            links.append(path)
        elif (real := os.path.realpath(path)) not in visited:
            visited.add(real)
            links += _walk(path, visited, found, listing)
    return links


def _takes(path: Path, listing: Listing) -> bool:
    """Whether a file is read; if not, count it with the reason."""
    if not path.is_file():
        listing.pass_over(path, "a link to nothing" if path.is_symlink() else "not a plain file")
    elif not is_known(path):
        endings = _printable("".join(path.suffixes[-2:] if path.suffix.lower() in PACKED else path.suffixes[-1:]))
        listing.pass_over(path, f"of unknown type {endings}" if endings else "without a file type")
    else:
        return True
    return False


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)


def is_known(file: Path) -> bool:
    """Whether a file has a type that megagrow reads."""
    name = file.name.lower()
    return unpacked(name).endswith(WHOLE + LINES) or name.endswith(TABLES)


def unpacked(name: str) -> str:
    """Return a file name without the ending of its compression."""
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name)


def _stdlib_files() -> list[InputFile]:
    """Return Python's own sources without tests, ordered by a hash of their path, so that a split mixes packages."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py") if file.is_file()]
    kept = [name for name in names if not _STDLIB_SKIPPED.intersection(name.parts)]
    if not kept:
        raise DataError(f"{STDLIB}: this Python has no sources in {root}; use another corpus")
    kept.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).hexdigest())
    return [InputFile(root / name, lenient=True) for name in kept]
