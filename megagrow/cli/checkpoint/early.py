"""What a conversion begins with, before anything large is imported: its workers, and the reading of its source."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagrow.convert.early import Readahead, WorkerPool


@contextmanager
def early(first: Path, workers: int) -> Iterator[tuple["WorkerPool | None", "Readahead | None"]]:
    """Start the other workers, and to read the source where the command line names its directory; end both in any case.

    Args:
        first: what is to be converted: a checkpoint's directory, or a family.yaml, whose source is not known yet.
        workers: processes, this one among them.
    """
    from megagrow.convert.early import Readahead, WorkerPool

    ahead = Readahead(first) if first.is_dir() else None
    crew = WorkerPool(workers - 1) if workers > 1 else None
    try:
        yield crew, ahead
    finally:
        if ahead is not None:
            ahead.end()
        if crew is not None:
            crew.end()
