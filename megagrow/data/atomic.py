"""Writes prepared data as whole files, with an error for the user when that fails.

Data is written to a temporary name next to its final one and renamed when complete (`megagrow.files.atomic`). So a
killed process or a full disk never leaves half a file under a name that later runs trust.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from megagrow.errors import DataError
from megagrow.files.atomic import replacement

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes `path`, on any error it is removed.

    Creates the directory if needed. DataError, naming the path, when the disk is full or the directory cannot be
    written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacement(path) as temporary:
            yield temporary
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"{path}: {error.strerror}: free some space, then run the same command again") from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise DataError(f"{path}: cannot be written: {error.strerror}; choose another save directory") from error
        raise


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of killed runs; the caller must hold the directory's lock."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
