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
def replacement(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success it is renamed to `path`, on any error removed.

    Args:
        path: the file.
        shared: several processes may replace it at the same time, so each has a temporary name of its own. Otherwise
            there is one name, and what a killed process left under it is overwritten by the next.
    """
    own = f"{uuid.uuid4().hex}." if shared else ""
    temporary = path.with_name(f".{path.name}.{own}tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str, *, durable: bool = False, shared: bool = False) -> None:
    """Replace a file with one rename.

    Args:
        path: the file; its directory must exist.
        text: its new content, written as UTF-8.
        durable: sync the content to disk before the rename. Without it a power failure can leave the file empty; a
            killed process cannot.
        shared: several processes may write it at the same time.

    Raises:
        OSError: the file could not be written; the old file is unchanged and no temporary file is left.
    """
    with replacement(path, shared=shared) as temporary, open(temporary, "w", encoding="utf-8") as stream:
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
