"""What starts before anything large is imported: worker processes, and read-ahead of the source by the kernel."""

from megagrow.convert.early.pool import IMPORT_TORCH
from megagrow.convert.early.warmup import Warmup

__all__ = ["IMPORT_TORCH", "Warmup"]
