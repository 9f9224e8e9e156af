"""Everything that a conversion starts before its large imports, as one object: worker processes and read-ahead.

A small conversion is mostly imports. So workers import next to the main process, and the disk is read meanwhile. This
module imports nothing large itself: the command line makes a `Warmup` before it imports anything else.
"""

from pathlib import Path
from types import TracebackType

from megagrow.convert.early.pool import WorkerPool
from megagrow.convert.early.readahead import Readahead


class Warmup:
    """The worker processes and the read-ahead of one conversion. As a context manager it ends both on exit.

    Args:
        workers: processes of the conversion on this machine, including this one; the others start at once.
    """

    def __init__(self, workers: int = 1) -> None:
        self._pool = WorkerPool(workers - 1)
        self._readahead: Readahead | None = None

    def __enter__(self) -> "Warmup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def begin(self, source: Path) -> None:
        """Start reading a source ahead. Does nothing the second time, or if `source` is a file such as a family.yaml.

        Args:
            source: a checkpoint's directory, or a directory of iterations with a tracker.
        """
        if self._readahead is None and source.is_dir():
            self._readahead = Readahead(source)

    def import_torch(self) -> None:
        """Let all workers import torch, once it is known that the conversion needs it."""
        self._pool.import_torch()

    def start_work(self, staging: Path, memory: int, **options: bool) -> None:
        """Let all workers take part in the conversion whose journal is in a staging directory.

        Args:
            staging: the directory.
            memory: bytes that all processes on this machine, including this one, may use together.
            options: of the run, for `megagrow.convert.work.worker`.
        """
        if self._readahead is not None:
            self._readahead.work_starts()
        self._pool.start_work(staging, memory, **options)

    def end(self) -> None:
        """Stop reading ahead, and kill workers that are still running. May be called more than once."""
        if self._readahead is not None:
            self._readahead.end()
        self._pool.end()
