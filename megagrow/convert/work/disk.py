"""Output files: allocated in full size, written once from front to back, hashed on the way."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megagrow.checkpoint.directory import BlockHasher
from megagrow.convert.targets import OutputFile
from megagrow.errors import CheckpointError

_BUFFER = 1 << 20
_WRITE_BACK = 8 << 20
"""Bytes after which the kernel is asked to start writing, so that dirty pages do not pile up."""


class OutputStream:
    """One output file: exactly `size` bytes, hashed while they are written."""

    def __init__(self, directory: Path, file: OutputFile, *, sha256: bool) -> None:
        self._path, self._file = directory / file.name, file
        if self._path.parent != directory:  # the staging directory itself exists, unless it was published
            self._path.parent.mkdir(exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._stream: BinaryIO = open(handle, "r+b", buffering=_BUFFER)
        os.ftruncate(handle, file.size)
        if file.size:
            _allocate(handle, file.size)
        self._hasher: Any = hashlib.sha256() if sha256 else xxhash.xxh3_128()
        self._hash_name = "sha256" if sha256 else "xxh3_128"
        self._blocks = BlockHasher()
        self._written = self._handed_over = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append data."""
        self._stream.write(data)
        for start in range(0, len(data), _BUFFER):  # a part at a time, so that both hashes find it in the cache
            part = memoryview(data)[start : start + _BUFFER]
            self._hasher.update(part)
            self._blocks.update(part)
        self._written += len(data)
        if self._written - self._handed_over >= _WRITE_BACK:
            self.hand_over()

    def hand_over(self) -> None:
        """Let the kernel start writing all data since the last call."""
        self._stream.flush()
        # this does not drop dirty pages, but starts writing them
        length = self._written - self._handed_over
        os.posix_fadvise(self._stream.fileno(), self._handed_over, length, os.POSIX_FADV_DONTNEED)
        self._handed_over = self._written

    def close(self) -> dict[str, Any]:
        """Bring everything to the disk; return the size, the hash under its name, and those of the blocks."""
        if self._written != self._file.size:
            raise AssertionError(f"{self._path}: {self._written} bytes were made, {self._file.size} were planned")
        self._stream.flush()
        os.fdatasync(self._stream.fileno())
        os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._stream.close()
        blocks = self._blocks.sums().sums.hex()
        return {"size": self._written, self._hash_name: self._hasher.hexdigest(), "blocks": blocks}

    def abandon(self) -> None:
        """Close the file in its present, incomplete state."""
        self._stream.close()


def _allocate(handle: int, size: int) -> None:
    """Reserve a file's space, so that a full disk is noticed before anything is written."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def check_space(directory: Path, needed: int) -> None:
    """Raise CheckpointError if a file system has less free space than `needed` bytes."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise CheckpointError(
            f"{directory}: the disk is full: {needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free"
        )


def is_disk_full(error: OSError) -> bool:
    """Whether an error means that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
