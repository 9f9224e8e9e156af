"""Let the disk work while torch is imported: the kernel reads what a conversion will ask for, into its own cache.

Nothing here imports torch. What is wrong with a checkpoint is for those to say who read it for its values.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from megagrow.config.paths import TRACKER

_STEP = 1 << 20
"""Bytes of one request: of a larger one the kernel reads no more than this."""
_SHARE = 4
"""Of the memory that is available at most so much, as a divisor, is filled ahead."""


class Readahead:
    """Reads a checkpoint's files ahead, the largest first, until it is told to end or has read enough.

    Where several ranks share a conversion it does nothing: each would read what the others need.

    Args:
        path: the checkpoint's directory, or one of iterations with a tracker.
    """

    def __init__(self, path: Path) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(path,), name="readahead", daemon=True)
        if all(os.environ.get(name, "1") == "1" for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
            self._thread.start()

    def end(self) -> None:
        """Begin no further request."""
        self._ended.set()

    def _read(self, path: Path) -> None:
        left = psutil.virtual_memory().available // _SHARE
        with suppress(OSError):
            for file in _files(path):
                handle = os.open(file, os.O_RDONLY)
                try:
                    size = os.fstat(handle).st_size
                    for offset in range(0, min(size, left), _STEP):
                        if self._ended.is_set():
                            return
                        os.posix_fadvise(handle, offset, _STEP, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)
                left -= size
                if left <= 0:
                    return


def _files(path: Path) -> list[Path]:
    tracker = path / TRACKER
    if tracker.is_file():
        named = tracker.read_text(errors="replace").strip()
        path = path / (f"iter_{int(named):07d}" if named.isdecimal() else named)
    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    return sorted(sizes, key=lambda file: (-sizes[file], file))
