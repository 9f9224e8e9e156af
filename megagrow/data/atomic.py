"""Files that are either whole or not there.

What is written goes to a temporary name beside its place and is renamed when it is complete, so a process that
is killed, or a disk that is full, never leaves half a file under a name that somebody trusts.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from megagrow.errors import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes `path`, on any error it is removed.

    Several processes may replace one path at a time: the temporary name is each one's own. DataError, naming the
    path, when the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"{path}: {error.strerror}: free some space, then run the same command again") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise DataError(f"{path}: cannot be written: {error.strerror}; choose another save directory") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of killed runs; only for a caller who knows that nobody else is writing."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
