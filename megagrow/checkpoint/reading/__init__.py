"""Slices of tensors out of files: a planner of reads, and the reads."""

from megagrow.checkpoint.reading.chunk_reader import BLOCK, ChunkReader
from megagrow.checkpoint.reading.files import Files

__all__ = ["BLOCK", "ChunkReader", "Files"]
