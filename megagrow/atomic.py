"""Replace a file atomically: a reader sees the old content or the new content, never a part of either.

Every small file that is replaced while others may read it is written here. Large files of prepared data use
`megagrow.data.atomic`, which writes them in pieces and turns a full disk into an error for the user.
"""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file with one rename.

    Args:
        path: the file; its directory must exist.
        text: its new content, written as UTF-8.
        durable: sync the content to disk before the rename. Without it a power failure can leave the file empty; a
            killed process cannot.

    Raises:
        OSError: the file could not be written; the old file is unchanged and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries to disk, so that a rename in it survives a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
