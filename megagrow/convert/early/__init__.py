"""What starts before anything large is imported: worker processes, and the kernel's read-ahead."""

from megagrow.convert.early.pool import TORCH, WorkerPool
from megagrow.convert.early.readahead import Readahead

__all__ = ["WorkerPool", "Readahead", "TORCH"]
