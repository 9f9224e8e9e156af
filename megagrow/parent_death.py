"""Die with your parent: a killed launcher must leave no process behind that still writes.

Used by the launcher for what it starts and by every rank for itself, so that `kill -9` of either ends the whole
tree within moments, and the same command can be given again at once.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere this does nothing.

    Args:
        parent: pid that the launcher knows as its own. If it is no longer our parent, it died before we asked, and
            we end here.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
