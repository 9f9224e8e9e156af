"""`python -m megagrow.runtime.torchrun`: torchrun, with three manners that a long job needs.

A request to stop (SIGTERM, SIGINT, SIGUSR1) is handed on to every rank, which finishes its step, saves and leaves;
plain torchrun would swallow it or kill the ranks after half a minute. When a rank fails, its own error line is
all that is shown, with its exit code, not a traceback of the launcher. And ranks die with it, even by `kill -9`.
"""

import logging
import os
import signal
import subprocess
import sys
from functools import partial
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from megagrow.lifeline import die_with_parent

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun with its own arguments; return the exit code of the first rank that failed, or 0."""
    die_with_parent()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in _FORWARDED:
        signal.signal(number, _forward)
    SubprocessHandler._popen = _start_rank  # type: ignore[method-assign, assignment]
    try:
        run.main(["--signals-to-handle", "SIGHUP", *(sys.argv[1:] if arguments is None else arguments)])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    return 0


def _start_rank(handler: SubprocessHandler, args: tuple, env: dict[str, str]) -> subprocess.Popen:
    """Start a rank that dies with this process from its first moment on, not only once it has imported torch."""
    mortal = partial(die_with_parent, os.getpid())
    return subprocess.Popen(
        args, env=env, stdout=handler._stdout, stderr=handler._stderr, start_new_session=True, preexec_fn=mortal
    )


def _forward(number: int, frame: FrameType | None) -> None:
    """Ask every rank to stop; SIGUSR1, so that a keyboard's SIGINT that they saw themselves does not count twice."""
    for rank in psutil.Process().children():
        try:
            rank.send_signal(signal.SIGUSR1)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
