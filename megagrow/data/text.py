"""Reads the documents of a source, in the order of its files.

A text file is one document; a JSONL file has one per line, a Parquet file one per row. `.gz` and `.zst` files are
read as what they contain. `.zst` and `.parquet` need the extra `corpus`.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megagrow import extras
from megagrow.config import DataSource
from megagrow.data.files import LINES, TABLES, InputFile, list_files, unpacked
from megagrow.errors import DataError

_ROWS = 1024
# Bytes of a .zst given to its decoder at a time: at most 256 MiB come out of 8 KiB.
_ZST_BYTES = 2**13


@dataclass
class Counts:
    """How many documents of a source were yielded, were empty, and were whole files that are not UTF-8."""

    documents: int = 0
    empty: int = 0
    not_utf8: int = 0


def documents(
    source: DataSource,
    progress: Callable[[int], None] | None = None,
    counts: Counts | None = None,
    files: list[InputFile] | None = None,
) -> Iterator[str]:
    """Yield the documents of a source in their fixed order; empty documents are left out.

    `progress` is called with the number of bytes read from disk since its last call; `counts` is kept up to date;
    `files` are those of `list_files`, if the caller has them. DataError for a missing path, an unreadable file or a
    line that is not a document.
    """
    counts = counts or Counts()
    for file in list_files(source).files if files is None else files:
        try:
            for document in _documents_of(file.path, source.json_key, progress or _ignore):
                counts.documents += bool(document)
                counts.empty += not document
                if document:
                    yield document
        except UnicodeDecodeError as error:
            if not file.lenient:
                raise DataError(f"{file.path}: not UTF-8 text (byte {error.start}); convert or remove it") from None
            counts.not_utf8 += 1
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file.path}: damaged {_packing(file.path)}: {error}") from None
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {error.strerror or error}") from None


def size_on_disk(files: list[InputFile]) -> int:
    """Return the total size in bytes of files, compressed ones as they are."""
    return sum(file.path.stat().st_size for file in files)


def _ignore(size: int) -> None:
    pass


def _packing(path: Path) -> str:
    return "Zstandard file" if path.suffix.lower() == ".zst" else "gzip"


def _documents_of(path: Path, json_key: str, progress: Callable[[int], None]) -> Iterator[str]:
    name = path.name.lower()
    if name.endswith(TABLES):
        yield from _rows(path, json_key, progress)
        return
    done = 0
    with open(path, "rb") as raw:
        stream: IO[bytes] = raw
        if name.endswith(".gz"):
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif name.endswith(".zst"):
            stream = io.BufferedReader(_Zstandard(path, raw), 2**17)
        for text in _texts(path, stream, json_key):
            progress(raw.tell() - done)
            done = raw.tell()
            yield text


def _texts(path: Path, stream: IO[bytes], json_key: str) -> Iterator[str]:
    if not unpacked(path.name.lower()).endswith(LINES):
        yield stream.read().decode("utf-8-sig")
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _document_of_line(line, json_key, f"{path}:{number}")


def _document_of_line(line: bytes, json_key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON document: {error}") from None
    if not isinstance(record, dict) or json_key not in record:
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place}: no field {json_key!r} (it has: {has}); set json_key of the source")
    return _clean(record[json_key], json_key, place)


def _clean(text: Any, key: str, place: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{place}: field {key!r} is not text but {type(text).__name__}")
    # JSON may contain half a surrogate pair, which no tokenizer can encode.
    return text.encode("utf-8", "replace").decode("utf-8")


def _rows(path: Path, key: str, progress: Callable[[int], None]) -> Iterator[str]:
    """Yield the column `key` of a Parquet file, a row at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(str(extras.missing("pyarrow", f"{path}: a .parquet file"))) from None
    try:
        with parquet.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if key not in names:
                raise DataError(f"{path}: no column {key!r} (it has: {', '.join(names)}); set json_key of the source")
            number, size = 0, path.stat().st_size
            for batch in file.iter_batches(batch_size=_ROWS, columns=[key]):
                for value in batch.column(0):
                    yield _clean(value.as_py(), key, f"{path}: row {number}")
                    number += 1
                # by rows, because a column is not read from end to end
                progress(size * number // rows - size * (number - len(batch)) // rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: damaged Parquet file: {error}") from None


class _Zstandard(io.RawIOBase):
    """The content of a .zst file; EOFError where its last frame is incomplete, which the library does not report."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(str(extras.missing("zstandard", f"{path}: a .zst file"))) from None
        self._raw, self._ready = raw, memoryview(b"")
        self._error = zstandard.ZstdError
        # `zstd --long=31` needs the largest window
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._packed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(_ZST_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._error as error:
                raise EOFError(str(error)) from None
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size
