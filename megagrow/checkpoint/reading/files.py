"""Files of a checkpoint's directory, opened when first read and read by position."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    pass
_AHEAD_FROM = 1 << 20
_AHEAD = 16 << 20
"""Bytes that the kernel is asked to read ahead, behind a read of at least `_AHEAD_FROM`."""
_MAX_OPEN = 64


class Files:
    """Files of a directory, opened when first read; the least recently used are closed again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._handles: OrderedDict[str, int] = OrderedDict()

    def handle(self, name: str) -> int:
        """A descriptor of a file; CheckpointError if it is not there."""
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
        """Fill a buffer from a file; CheckpointError if the file ends before."""
        handle, done = self.handle(name), 0
        if len(view) >= _AHEAD_FROM:  # what lies behind is most likely asked for next: the disk shall not wait for us
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
        """Tell the kernel that a range will not be read again."""
        os.posix_fadvise(self.handle(name), offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def __del__(self) -> None:
        self.close()


def outside(name: str) -> bool:
    """Whether a file's name in an index leads out of the checkpoint's directory."""
    return Path(name).is_absolute() or ".." in Path(name).parts
