"""TODO."""

from pathlib import Path


def path_text(path: Path, key: str) -> str:
    """How errors name a tensor in a file."""
    return f"{path}: {key}"
