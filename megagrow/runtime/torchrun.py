"""`python -m megagrow.runtime.torchrun`: torchrun, with four manners that a long job needs.

A request to stop (SIGTERM, SIGINT, SIGUSR1) is handed on to every rank, which finishes its step, saves and leaves;
plain torchrun would swallow it or kill the ranks after half a minute. When a rank fails, its own error line is
all that is shown, with its exit code, not a traceback of the launcher. And ranks die with it, even by `kill -9`.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial, partialmethod
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from megagrow.parent_death import die_with_parent

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TO_LEAVE_S = 3.0
"""Seconds that ranks have to leave by themselves once one has failed: a rank that lost another soon notices."""
_TO_END_S = 5
"""Seconds that those which have not have after SIGTERM, before SIGKILL."""


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun with its own arguments; return the exit code of the first rank that failed, or 0."""
    die_with_parent()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in _FORWARDED:
        signal.signal(number, _forward)
    SubprocessHandler._popen = _start_rank  # type: ignore[method-assign, assignment]
    SubprocessContext._close = partialmethod(_end_ranks, SubprocessContext._close)  # type: ignore[method-assign, assignment]
    try:
        run.main(["--signals-to-handle", "SIGHUP", *(sys.argv[1:] if arguments is None else arguments)])
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        for rank, failure in failures[:1]:
            if failure.exitcode < 0:
                print(f"megagrow: error: {_killed(rank, failure)}", file=sys.stderr)
        return next((failure.exitcode for _, failure in failures if failure.exitcode > 0), 1)
    return 0


def _killed(rank: int, failure: ProcessFailure) -> str:
    """What is known of a rank that said nothing."""
    name = signal.Signals(-failure.exitcode).name
    memory = " (as the kernel does when memory runs out)" if name == "SIGKILL" else ""
    return f"rank {rank} was killed by {name}{memory}; the same command goes on from the last checkpoint"


def _start_rank(handler: SubprocessHandler, args: tuple, env: dict[str, str]) -> subprocess.Popen:
    """Start a rank that dies with this process from its first moment on, not only once it has imported torch."""
    mortal = partial(die_with_parent, os.getpid())
    return subprocess.Popen(
        args, env=env, stdout=handler._stdout, stderr=handler._stderr, start_new_session=True, preexec_fn=mortal
    )


def _end_ranks(context: SubprocessContext, close: Callable[..., None], death_sig: signal.Signals, timeout: int) -> None:
    """Take down the ranks that are left when one has failed: let them leave, ask them to, kill them."""
    deadline = time.monotonic() + _TO_LEAVE_S
    ranks = [handler.proc for handler in context.subprocess_handlers.values()]
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    close(context, death_sig, min(timeout, _TO_END_S))


def _forward(number: int, frame: FrameType | None) -> None:
    """Ask every rank to stop; SIGUSR1, so that a keyboard's SIGINT that they saw themselves does not count twice."""
    for rank in psutil.Process().children():
        try:
            rank.send_signal(signal.SIGUSR1)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
