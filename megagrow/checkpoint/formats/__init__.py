"""One folder a format, one way in: `open_checkpoint` finds out what a directory holds."""

from megagrow.checkpoint.formats.open import open_checkpoint, precision_of, resolve

__all__ = ["open_checkpoint", "precision_of", "resolve"]
