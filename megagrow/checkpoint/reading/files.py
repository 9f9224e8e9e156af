"""The files of a checkpoint's directory: opened at the first read, and read by position."""

import os
from collections import OrderedDict
from pathlib import Path

from megagrow.errors import CheckpointError

_AHEAD_FROM = 1 << 20
_AHEAD = 16 << 20
"""Bytes that the kernel is asked to read ahead, after a read of at least `_AHEAD_FROM` bytes."""
_MAX_OPEN = 64


class Files:
    """The files of a directory; of more than `_MAX_OPEN`, the least recently used are closed again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handles: OrderedDict[str, int] = OrderedDict()

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
        """Fill a buffer from a file; CheckpointError if the file ends before that."""
        handle, done = self.handle(name), 0
        if len(view) >= _AHEAD_FROM:  # the next bytes are most likely read next: without this the disk idles meanwhile
            os.posix_fadvise(handle, offset, len(view) + _AHEAD, os.POSIX_FADV_WILLNEED)
        while done < len(view):
            try:
                got = os.preadv(handle, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.root / name}: {error.strerror} at byte {offset + done}") from None
            if not got:
                raise CheckpointError(f"{self.root / name}: cut short: ends before byte {offset + len(view)}")
            done += got

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
