"""Lets the kernel read a checkpoint into its cache while the conversion is still being imported and planned.

This module does not import torch. Errors are ignored here: they are reported when the values are read.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from megagrow import slurm_step
from megagrow.tracker import MAX_TRACKER, TRACKER, iteration_in

_STEP = 32 << 20
"""Bytes of one request. Each request releases the interpreter lock and gets it back only when the importing thread
releases it: requests of 1 MiB took 10 s for what takes 1 s this way."""
_THREADS = 2
_DATA_SUFFIXES = (".distcp", ".safetensors", ".pt")
_SHARE = 4
"""At most the available memory divided by this is read ahead."""
_Step = tuple[Path, int, int]
"""File, offset and length of a request."""


class Readahead:
    """Reads a checkpoint's files ahead, the largest first, until it is ended or has read enough.

    It does nothing if several ranks share the conversion, since each would read what the others need.

    Args:
        path: the checkpoint's directory, or a directory of iterations with a tracker.
    """

    def __init__(self, path: Path) -> None:
        self._ended = threading.Event()
        self._is_whole = True
        steps: list[_Step] = []
        if all(os.environ.get(name, "1") == "1" for name in ("WORLD_SIZE", slurm_step.TASK_COUNT)):
            steps, self._is_whole = _steps(path, psutil.virtual_memory().available // _SHARE)
        self._threads = [
            threading.Thread(target=self._read, args=(steps[number::_THREADS],), name="readahead", daemon=True)
            for number in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def work_starts(self) -> None:
        """Stop unless the whole source fits: the rest of a part may not be what the workers read next."""
        if not self._is_whole:
            self.end()

    def end(self) -> None:
        """Start no further request."""
        self._ended.set()

    def _read(self, steps: list[_Step]) -> None:
        with suppress(OSError):
            for file, offset, length in steps:
                if self._ended.is_set():
                    return
                _fill_cache(file, offset, length)


def _fill_cache(file: Path, offset: int, length: int) -> None:
    """Let the kernel read a part of a file into its cache. Sent to /dev/null, no page is copied."""
    with open(file, "rb", buffering=0) as source, open(os.devnull, "wb", buffering=0) as sink:
        end = offset + length
        while offset < end and (sent := os.sendfile(sink.fileno(), source.fileno(), offset, end - offset)):
            offset += sent


def _steps(path: Path, left: int) -> tuple[list[_Step], bool]:
    """The requests for at most `left` bytes, and whether they cover all files."""
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
    """Data files and their sizes, the largest first."""
    sizes: dict[Path, int] = {}
    with suppress(OSError):
        tracker = path / TRACKER
        if tracker.is_file():
            with open(tracker, encoding="utf-8", errors="replace") as stream:
                newest = stream.read(MAX_TRACKER).strip()
            iteration = iteration_in(newest)
            if iteration is None and newest != "release":
                return []
            path = path / (newest if iteration is None else f"iter_{iteration:07d}")
        folders = (path, *path.glob("mp_rank_*"))
        data = (file for folder in folders for file in folder.glob("*") if file.suffix in _DATA_SUFFIXES)
        sizes |= {file: file.stat().st_size for file in data if file.is_file()}
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
