"""Write a file as a whole: whoever reads it sees the old content or the new, never a part.

Every small file that is replaced while others may read it goes through here. Large files of prepared data go through
`megagrow.data.atomic`, which writes them piece by piece and turns a full disk into an error for the user.
"""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file by one rename.

    Args:
        path: the file; its directory must exist.
        text: its new content, written as UTF-8.
        durable: bring the content to the disk before the rename. Without it a power failure, but no kill, can leave
            the file empty.

    Raises:
        OSError: it could not be written; the old file is still there, and nothing else is left.
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
    """Bring a directory's entries to the disk, so that a rename in it survives a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
