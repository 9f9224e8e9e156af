"""End a process when its parent dies, so that a killed launcher leaves no process behind that still writes.

The launcher does this for the processes it starts, and every rank does it for itself. `kill -9` of either therefore
ends the whole process tree within moments, and the same command can be run again at once.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent dies; does nothing on other systems.

    Args:
        parent: the launcher's own pid. If it is no longer the parent of this process, the launcher died before the
            request was made, and this process kills itself.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
