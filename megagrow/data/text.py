"""Reads the documents of a source, always in the same order.

A path of a source is a file, a directory, a glob or the word `python-stdlib`; each is expanded to a sorted list of
files. A text file is one document, a JSONL file has one per line. Order matters because the split into train,
validation and test is by documents, so nothing here depends on the file system's own order.
"""

import glob
import gzip
import hashlib
import json
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from megagrow.config import DataSource
from megagrow.config.family import STDLIB
from megagrow.errors import DataError

_WHOLE = (".txt", ".md", ".py")
_LINES = (".jsonl", ".json")
_KINDS = "a file is .txt .md .py .jsonl or .json, each also with .gz"
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


class InputFile(NamedTuple):
    """A file of a source. A `lenient` one is skipped without an error if it is not UTF-8 (Python's own files)."""

    path: Path
    lenient: bool = False


def documents(source: DataSource, progress: Callable[[int], None] | None = None) -> Iterator[str]:
    """Yield the documents of a source in their fixed order; empty documents are left out.

    `progress` is called with the number of bytes read from disk since its last call. DataError for a missing path, an
    unreadable file or a line that is not a document.
    """
    for file in input_files(source):
        done = 0
        try:
            with open(file.path, "rb") as raw:
                for document in _documents_of(file.path, raw, source.json_key):
                    if progress is not None:
                        progress(raw.tell() - done)
                        done = raw.tell()
                    if document:
                        yield document
        except UnicodeDecodeError as error:
            if not file.lenient:
                raise DataError(f"{file.path}: not UTF-8 text (byte {error.start}); convert or remove it") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file.path}: damaged gzip: {error}") from None
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {error.strerror}") from None


def input_files(source: DataSource) -> list[InputFile]:
    """Return the files of a source in order, each once; DataError if a path is missing or has no usable file."""
    files: dict[Path, InputFile] = {}
    for path in source.paths:
        found = _stdlib_files() if path == STDLIB else [InputFile(file) for file in _expand(path, source.name)]
        for file in found:
            files.setdefault(file.path, file)
    return list(files.values())


def input_state(source: DataSource) -> dict[str, str]:
    """Return the state of a source's input as JSON-able sizes and times, to detect changes.

    Python's own sources are identified by Python's version, because their times differ between machines.
    """
    if source.prefix is not None:
        files = [Path(source.prefix + ending) for ending in (".bin", ".idx")]
    else:
        files = [file for path in source.paths if path != STDLIB for file in _expand(path, source.name)]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DataError(f"source {source.name!r}: {missing} does not exist")
    state = {str(file): file_state(file) for file in files}
    if STDLIB in source.paths:
        state[STDLIB] = platform.python_version()
    return state


def file_state(file: Path) -> str:
    """Return the size of a file and the time of its last change, as text for comparison."""
    status = file.stat()
    return f"{status.st_size} bytes, mtime {status.st_mtime_ns}"


def size_on_disk(source: DataSource) -> int:
    """Return the total size in bytes of a source's files, compressed ones as they are."""
    return sum(file.path.stat().st_size for file in input_files(source))


def _documents_of(path: Path, raw: IO[bytes], json_key: str) -> Iterator[str]:
    name = path.name.lower()
    stream: IO[bytes] = raw
    if name.endswith(".gz"):
        name, stream = name.removesuffix(".gz"), cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if not name.endswith(_LINES):
        yield stream.read().decode("utf-8-sig")
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _document_of_line(line, json_key, f"{path}:{number}")


def _document_of_line(line: bytes, json_key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: not a JSON document: {error}") from None
    if not isinstance(record, dict) or json_key not in record:
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place}: no field {json_key!r} (it has: {has}); set json_key of the source")
    text = record[json_key]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {json_key!r} is not text but {type(text).__name__}")
    # JSON may contain half a surrogate pair, which no tokenizer can encode.
    return text.encode("utf-8", "replace").decode("utf-8")


def _expand(path: str, source: str) -> list[Path]:
    """Return the files of one entry of `paths`, sorted."""
    place = Path(path).expanduser()
    if place.is_file():
        if not _is_known(place):
            raise DataError(f"source {source!r}: {path} has an unknown file type: {_KINDS}")
        return [place]
    if place.is_dir():
        found = _files_below(place)
    else:
        matches = sorted(Path(match) for match in glob.glob(str(place), recursive=True))
        if not matches:
            raise DataError(f"source {source!r}: path {path!r} does not exist and matches nothing (from {Path.cwd()})")
        found = [file for match in matches for file in (_files_below(match) if match.is_dir() else [match])]
        found = [file for file in found if _is_known(file)]
    if not found:
        raise DataError(f"source {source!r}: no text in {path}: {_KINDS}")
    return found


def _files_below(directory: Path) -> list[Path]:
    """Return files of known types under a directory, except hidden files and those in hidden directories."""
    inside = (file.relative_to(directory) for file in directory.rglob("*") if file.is_file() and _is_known(file))
    return [directory / file for file in sorted(inside) if not any(part.startswith(".") for part in file.parts)]


def _is_known(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(_WHOLE + _LINES)


def _stdlib_files() -> list[InputFile]:
    """Return Python's own sources without tests, ordered by a hash of their path, so that a split mixes packages."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py") if file.is_file()]
    kept = [name for name in names if not _STDLIB_SKIPPED.intersection(name.parts)]
    if not kept:
        raise DataError(f"{STDLIB}: this Python has no sources in {root}; use another corpus")
    kept.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).hexdigest())
    return [InputFile(root / name, lenient=True) for name in kept]
