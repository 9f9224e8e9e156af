"""Whether a process holds a lock file. A lock goes with its process, so it shows who lives; a record does not."""

import fcntl
from pathlib import Path


def is_held(path: Path) -> bool | None:
    """Whether a process holds this lock file; None where the file system cannot tell.

    The lock is taken for a moment, shared, and given back, so whoever wants the lock must try for more than a moment.
    """
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
