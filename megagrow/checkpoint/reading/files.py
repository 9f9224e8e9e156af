"""The files of a checkpoint's directory: opened at the first read, read by position, compared with their checksums."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from megagrow.checkpoint.directory import BlockSums, integrity
from megagrow.checkpoint.pickles import ByteSource
from megagrow.checkpoint.reading.block_check import BlockCheck
from megagrow.errors import CheckpointError

_AHEAD_FROM = 1 << 20
_AHEAD = 16 << 20
"""Bytes that the kernel is asked to read ahead, after a read of at least `_AHEAD_FROM` bytes."""
_MAX_OPEN = 64


class Files:
    """The files of a directory; of more than `_MAX_OPEN`, the least recently used are closed again.

    If the directory has checksums of blocks, every block is compared when the first of its bytes are read.
    """

    def __init__(self, root: Path, *, checksums: bool = True) -> None:
        """Args:
        root: the directory.
        checksums: whether to compare blocks.
        """
        self.root = root
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._sums: Mapping[str, BlockSums] | None = None if checksums else {}
        self._checks: dict[str, BlockCheck | None] = {}

    def handle(self, name: str) -> int:
        """Return a descriptor of a file; CheckpointError if it cannot be opened."""
        if name in self._handles:
            self._handles.move_to_end(name)
            return self._handles[name]
        try:
            handle = os.open(self.root / name, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.root / name}: {error.strerror}") from None
        self._handles[name] = handle
        if len(self._handles) > _MAX_OPEN:
            os.close(self._handles.popitem(last=False)[1])
        return handle

    def read(self, name: str, offset: int, view: memoryview) -> None:
        """Fill a buffer from a file; CheckpointError if the file ends before that, or a block of it has changed."""
        handle, check = self.handle(name), self._check(name)
        if len(view) >= _AHEAD_FROM:  # the next bytes are most likely read next: without this the disk idles meanwhile
            os.posix_fadvise(handle, offset, len(view) + _AHEAD, os.POSIX_FADV_WILLNEED)
        if check is None:
            self._fill(handle, name, offset, view)
            return
        at = 0
        while at < len(view):  # block by block, so that a block is hashed while it is in the processor's cache
            part = view[at : at + check.block - (offset + at) % check.block]
            self._fill(handle, name, offset + at, part)
            check.compare(handle, offset + at, part)
            at += len(part)

    def source(self, name: str) -> ByteSource:
        """Return a function of size and offset that returns bytes of a file; fewer where the file ends."""
        self.handle(name)
        return partial(self._bytes, name)

    def forget(self, name: str, offset: int, length: int) -> None:
        """Drop a range that will not be read again from the kernel's cache."""
        os.posix_fadvise(self.handle(name), offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __del__(self) -> None:
        self.close()

    def _fill(self, handle: int, name: str, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(handle, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.root / name}: {error.strerror} at byte {offset + done}") from None
            if not got:
                raise CheckpointError(f"{self.root / name}: cut short: ends before byte {offset + len(view)}")
            done += got

    def _bytes(self, name: str, size: int, offset: int) -> bytes:
        handle = self.handle(name)
        try:
            data = os.pread(handle, size, offset)
        except OSError as error:
            raise CheckpointError(f"{self.root / name}: {error.strerror} at byte {offset}") from None
        if (check := self._check(name)) is not None:
            check.compare(handle, offset, memoryview(data))
        return data

    def _check(self, name: str) -> BlockCheck | None:
        """Return what compares the blocks of a file; None if there is nothing to compare."""
        if name not in self._checks:
            if self._sums is None:
                self._sums = integrity.blocks_of(self.root)
            sums = self._sums.get(name)
            self._checks[name] = None if sums is None else BlockCheck(self.root / name, sums)
        return self._checks[name]
