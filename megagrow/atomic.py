"""Write a file as a whole: readers see the old content or the new, never a part of it.

Every file that is replaced while others may read it goes through here. Prepared data goes through
`megagrow.data.atomic`, which adds a DataError for a full disk or a directory that cannot be written.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success it is renamed to `path`, on any error removed.

    Several processes may replace one path at the same time: each has a temporary name of its own.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file with one rename.

    Args:
        path: the file; its directory must exist.
        text: its new content, written as UTF-8.
        durable: sync the content to disk before the rename. Without it a power failure can leave the file empty; a
            killed process cannot.

    Raises:
        OSError: the file could not be written; the old file is unchanged and no temporary file is left.
    """
    with replacement(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries to disk, so that a rename in it survives a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
