"""Let the disk work while a conversion is still being imported and planned: the kernel reads what it will ask for.

Nothing here imports torch. What is wrong with a checkpoint is for those to say who read it for its values.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from megagrow import slurm_step
from megagrow.tracker import TRACKER

_STEP = 32 << 20
"""Bytes of one request. Each gives up the interpreter once, and has it back when the one who imports lets go of it:
requests of 1 MiB took 10 s for what takes 1 s so."""
_THREADS = 2
_DATA = (".distcp", ".safetensors", ".pt")
_SHARE = 4
"""Of the memory that is available at most so much, as a divisor, is filled ahead."""
_Step = tuple[Path, int, int]
"""File, offset and length of a request."""


class Readahead:
    """Reads a checkpoint's files ahead, the largest first, until it is told to end or has read enough.

    Where several ranks share a conversion it does nothing: each would read what the others need.

    Args:
        path: the checkpoint's directory, or one of iterations with a tracker.
    """

    def __init__(self, path: Path) -> None:
        self._ended = threading.Event()
        self._whole = True
        steps: list[_Step] = []
        if all(os.environ.get(name, "1") == "1" for name in ("WORLD_SIZE", slurm_step.TASKS)):
            steps, self._whole = _steps(path, psutil.virtual_memory().available // _SHARE)
        self._threads = [
            threading.Thread(target=self._read, args=(steps[number::_THREADS],), name="readahead", daemon=True)
            for number in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def work_begins(self) -> None:
        """Go on only where the whole source is read: part of it may be another than what the workers ask for next."""
        if not self._whole:
            self.end()

    def end(self) -> None:
        """Begin no further request."""
        self._ended.set()

    def _read(self, steps: list[_Step]) -> None:
        with suppress(OSError):
            for file, offset, length in steps:
                if self._ended.is_set():
                    return
                _fill_cache(file, offset, length)


def _fill_cache(file: Path, offset: int, length: int) -> None:
    """Let the kernel read a part of a file: it hands its pages to nobody, so nothing is copied."""
    with open(file, "rb", buffering=0) as source, open(os.devnull, "wb", buffering=0) as nowhere:
        end = offset + length
        while offset < end and (sent := os.sendfile(nowhere.fileno(), source.fileno(), offset, end - offset)):
            offset += sent


def _steps(path: Path, left: int) -> tuple[list[_Step], bool]:
    """The requests for at most so many bytes, and whether that is all there is."""
    steps: list[_Step] = []
    for file, size in _files(path):
        for offset in range(0, size, _STEP):
            length = min(_STEP, size - offset)
            if length > left:
                return steps, False
            steps.append((file, offset, length))
            left -= length
    return steps, True


def _files(path: Path) -> list[tuple[Path, int]]:
    """Files and their sizes, the largest first."""
    sizes: dict[Path, int] = {}
    with suppress(OSError):
        tracker = path / TRACKER
        if tracker.is_file():
            named = tracker.read_text(errors="replace").strip()
            path = path / (f"iter_{int(named):07d}" if named.isdecimal() else named)
        data = (file for place in (path, *path.glob("mp_rank_*")) for file in place.glob("*") if file.suffix in _DATA)
        sizes |= {file: file.stat().st_size for file in data if file.is_file()}
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
