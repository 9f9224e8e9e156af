"""How large pieces may be, so that all workers together stay within the memory that they are allowed."""

import psutil

from megagrow.convert.make import PIECE_VALUES
from megagrow.errors import CheckpointError

DEFAULT_MEMORY = 1 << 30
_FIXED = 40 << 20
"""Bytes beside a worker's pieces: file buffers, hashes, the plan, and imports that are still to come."""
_WORKER_BYTES = 280 << 20
"""Of a worker that has imported all that it needs, and made nothing yet."""
_BYTES_A_VALUE = 32
"""Bytes that a worker needs at most for each value of a piece: read, gathered, grown, cast and cut."""
_MIN_VALUES = 1 << 16


def piece_values(memory: int, workers: int) -> int:
    """Values of a piece, so that some workers together stay within `memory` bytes.

    Raises:
        CheckpointError: the programs alone need more.
    """
    own = int(psutil.Process().memory_info().rss)
    base = own + (workers - 1) * min(own, _WORKER_BYTES)  # a worker imports less than a process that does other things
    values = ((memory - base) // workers - _FIXED) // _BYTES_A_VALUE
    if values < _MIN_VALUES:
        need = base + (_FIXED + _MIN_VALUES * _BYTES_A_VALUE) * workers
        raise CheckpointError(
            f"--memory {memory / 2**20:,.0f}MiB is too little for {workers} workers, which need "
            f"{need / 2**20:,.0f}MiB with all that they import; give more, or fewer workers"
        )
    return min(values, PIECE_VALUES)
