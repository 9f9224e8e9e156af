"""The checkpoint formats, one folder each, and `open_checkpoint`, which recognizes the format and opens it."""

from megagrow.checkpoint.formats.open import open_checkpoint, precision_of, resolve_directory

__all__ = ["open_checkpoint", "precision_of", "resolve_directory"]
