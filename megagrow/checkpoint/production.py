"""Make the units of a planned target: whoever runs this takes what is free until nothing is left.

A file is allocated in its full size, written from its first byte to its last and hashed on the way. When all files of
a unit are on the disk, their sizes and hashes are marked in the journal, in the background of the next unit. What an
interrupted worker had begun is made again from its first byte, to the same bytes.
"""

import errno
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megagrow.checkpoint.journal import Journal, wait
from megagrow.checkpoint.store import OutputFile, Production
from megagrow.errors import CheckpointError

_BUFFER = 1 << 20
_WRITE_BACK = 8 << 20
"""Bytes after which the kernel is asked to begin writing: a conversion must not pile up dirty pages."""
_SHORTEST_WAIT, _LONGEST_WAIT = 0.01, 0.2
"""Seconds between looks at what others are still at: at the end of a conversion nobody shall be waited for in vain."""


class OutputStream:
    """One file: exactly `size` bytes, hashed as they come."""

    def __init__(self, directory: Path, file: OutputFile, *, sha256: bool) -> None:
        self._path, self._file = directory / file.name, file
        if self._path.parent != directory:  # which is there, unless it was published
            self._path.parent.mkdir(exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stream: BinaryIO = open(handle, "r+b", buffering=_BUFFER)
        os.ftruncate(handle, file.size)
        if file.size:
            _allocate(handle, file.size)
        self._hash: Any = hashlib.sha256() if sha256 else xxhash.xxh3_128()
        self._name = "sha256" if sha256 else "xxh3_128"
        self._written = self._handed = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._stream.write(data)
        self._hash.update(data)
        self._written += len(data)
        if self._written - self._handed >= _WRITE_BACK:
            self.hand_over()

    def hand_over(self) -> None:
        """Let the kernel begin to write what it has not yet been told of."""
        self._stream.flush()
        # dirty pages are not dropped by this, but it starts their writing
        length = self._written - self._handed
        os.posix_fadvise(self._stream.fileno(), self._handed, length, os.POSIX_FADV_DONTNEED)
        self._handed = self._written

    def close(self) -> dict[str, Any]:
        """Bring all to the disk; return size and hashes."""
        if self._written != self._file.size:
            raise AssertionError(f"{self._path}: {self._written} bytes were made, {self._file.size} were planned")
        self._stream.flush()
        os.fdatasync(self._stream.fileno())
        os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._stream.close()
        return {"size": self._written, self._name: self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close as it is."""
        self._stream.close()


def work(production: Production, staging: Path, journal: Journal, *, sha256: bool, first: int = 0) -> None:
    """Make units until all are finished, by this worker or by others.

    Args:
        production: the plan.
        staging: where its files go.
        journal: of the conversion.
        sha256: hash by it, as Megatron does; else by xxh3_128, which takes a tenth of the time.
        first: unit to begin with, so that workers do not all ask for the same one.
    """
    files = production.units
    order = [*range(first, len(files)), *range(first)]
    with journal.alive(), ThreadPoolExecutor(1) as background:
        closing: Future[None] | None = None
        idle = 0.0
        while True:
            done = journal.finished_units()
            left = [unit for unit in order if unit not in done]
            if not left:
                return
            busy = False
            for unit in left:
                if (journal.path / f"unit-{unit:06d}.done").exists() or not journal.claim(f"unit-{unit:06d}"):
                    continue
                busy = True
                if (journal.path / f"unit-{unit:06d}.done").exists():  # finished between the look and the claim
                    journal.release(f"unit-{unit:06d}")
                    continue
                streams = _make(production, unit, staging, journal, sha256=sha256)
                if closing is not None:
                    closing.result()
                closing = background.submit(_close, journal, unit, files[unit], streams)
            if closing is not None:
                closing.result()
                closing = None
            idle = 0.0 if busy else min(max(_SHORTEST_WAIT, 2 * idle), _LONGEST_WAIT)
            if idle:
                wait(idle)


def _make(production: Production, unit: int, staging: Path, journal: Journal, *, sha256: bool) -> list[OutputStream]:
    streams: list[OutputStream] = []
    try:
        for file in production.units[unit]:
            streams.append(OutputStream(staging, file, sha256=sha256))
        for index, data in production.produce(unit):
            streams[index].write(data)
            journal.done_bytes += len(data)
    except BaseException:
        for stream in streams:
            stream.abandon()
        raise
    return streams


def _close(journal: Journal, unit: int, files: tuple[OutputFile, ...], streams: list[OutputStream]) -> None:
    for stream in streams:  # all at once, so that the disk need not wait between them
        stream.hand_over()
    told = {file.name: stream.close() for file, stream in zip(files, streams, strict=True)}
    journal.finish(unit, told)


def _allocate(handle: int, size: int) -> None:
    """Reserve a file's space, so that a disk that is too small is noticed before anything is written."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def check_space(directory: Path, needed: int) -> None:
    """Raise CheckpointError where a file system has not room for so many more bytes."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise CheckpointError(
            f"{directory}: the disk is full: {needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free"
        )
