"""Slices of tensors out of files: a planner of reads, and the reads."""

from megagrow.checkpoint.reading.chunk_reader import ChunkReader
from megagrow.checkpoint.reading.files import Files
from megagrow.checkpoint.reading.strided import BLOCK

__all__ = ["BLOCK", "ChunkReader", "Files"]
