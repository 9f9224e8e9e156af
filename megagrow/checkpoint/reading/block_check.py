"""Compares the blocks of files with their checksums while slices are read."""

import os
from pathlib import Path

import xxhash

from megagrow.checkpoint.directory import BlockSums
from megagrow.errors import CheckpointError

_BUFFER = 1 << 18
_AHEAD_FROM = 1 << 20


class BlockCheck:
    """Compares each block of one file with its checksum, once: when the first of its bytes are read.

    The bytes that were read are hashed where they are. The rest of their first and last block is read through a small
    buffer, whatever the size of a block; most of that is read again soon, from the kernel's cache.

    Attributes:
        block: bytes of a block.
    """

    def __init__(self, file: Path, sums: BlockSums) -> None:
        self._file, self._sums = file, sums
        self.block = sums.block
        self._compared = bytearray(len(sums))
        self._buffer = memoryview(b"")

    def compare(self, handle: int, offset: int, data: memoryview) -> None:
        """Compare all blocks of which `data`, the bytes of the file from `offset` on, has a part.

        Raises:
            CheckpointError: a block has changed since it was written, or the file is longer than it was.
        """
        stop = offset + len(data)
        if not len(data):
            return
        if stop > self._sums.size:
            raise CheckpointError(f"{self._file}: longer than the {self._sums.size} bytes that were written")
        last = -(-stop // self._sums.block)
        number = self._compared.find(0, offset // self._sums.block, last)
        while number >= 0:
            if self._digest(handle, number, offset, data) != self._sums.of(number):
                raise self._sums.damage(self._file, number)
            self._compared[number] = 1
            number = self._compared.find(0, number + 1, last)

    def _digest(self, handle: int, number: int, offset: int, data: memoryview) -> bytes:
        """Hash a block: what is before `data` in it, its part of `data`, and what is after."""
        (begin, end), stop = self._sums.extent(number), offset + len(data)
        hasher = xxhash.xxh3_64()
        self._add(hasher, handle, begin, offset)
        hasher.update(data[max(begin - offset, 0) : end - offset])
        self._add(hasher, handle, stop, end)
        return hasher.digest()

    def _add(self, hasher: xxhash.xxh3_64, handle: int, begin: int, end: int) -> None:
        """Hash a range of the file, if it is not empty."""
        if end - begin >= _AHEAD_FROM:
            os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)
        while begin < end:
            if not len(self._buffer):
                self._buffer = memoryview(bytearray(_BUFFER))
            part = self._buffer[: min(_BUFFER, end - begin)]
            try:
                got = os.preadv(handle, [part], begin)
            except OSError as error:
                raise CheckpointError(f"{self._file}: {error.strerror} at byte {begin}") from None
            if not got:
                raise CheckpointError(f"{self._file}: cut short: ends before byte {self._sums.size}")
            hasher.update(part[:got])
            begin += got
