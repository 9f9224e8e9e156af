"""The size of pieces with which all workers together stay within their memory limit."""

import psutil

from megagrow.convert.make import PIECE_VALUES
from megagrow.errors import CheckpointError

DEFAULT_MEMORY = 1 << 30
_FIXED = 40 << 20
"""Bytes that a worker needs besides its pieces: file buffers, hashes, the plan, and later imports."""
_WORKER_BYTES = 280 << 20
"""Memory of a worker that has imported everything and made nothing yet."""
_BYTES_A_VALUE = 32
"""Most bytes that a worker needs per value of a piece: read, gathered, grown, cast and cut."""
_MIN_VALUES = 1 << 16


def piece_values(memory: int, workers: int) -> int:
    """Values of a piece with which `workers` processes stay within `memory` bytes together.

    Raises:
        CheckpointError: the programs alone need more memory.
    """
    own = int(psutil.Process().memory_info().rss)
    base = own + (workers - 1) * min(own, _WORKER_BYTES)  # a worker imports less than a larger program does
    values = ((memory - base) // workers - _FIXED) // _BYTES_A_VALUE
    if values < _MIN_VALUES:
        need = base + (_FIXED + _MIN_VALUES * _BYTES_A_VALUE) * workers
        raise CheckpointError(
            f"--memory {memory / 2**20:,.0f}MiB is too little for {workers} workers, which need "
            f"{need / 2**20:,.0f}MiB including their imports; give more memory or use fewer workers"
        )
    return min(values, PIECE_VALUES)
