"""`python -m megagrow.runtime.torchrun`: torchrun with the signal and error handling that a long job needs.

A request to stop (SIGTERM, SIGINT, SIGUSR1) is forwarded to every rank, which finishes its step, saves and exits; plain
torchrun would swallow it or kill the ranks after half a minute. When a rank fails, only its own error line is shown,
without a traceback of the launcher, and its exit code is returned. Ranks die with the launcher, even on `kill -9`.
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
"""Seconds for ranks to exit on their own once one has failed: a rank soon notices that another died."""
_TO_END_S = 5
"""Seconds between SIGTERM and SIGKILL for ranks that have not exited by then."""


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun with its own arguments; return the exit code of the first rank that failed, or 0."""
    die_with_parent()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in _FORWARDED:
        signal.signal(number, _forward)
    end_ranks = partialmethod(_end_ranks, SubprocessContext._close)
    SubprocessHandler._popen = _start_rank  # type: ignore[method-assign, assignment]  # torch has no hook for this
    SubprocessContext._close = end_ranks  # type: ignore[method-assign, assignment]  # torch has no hook for this
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
    """Describe the end of a rank that was killed by a signal and so printed no error."""
    name = signal.Signals(-failure.exitcode).name
    memory = " (as the kernel does when memory runs out)" if name == "SIGKILL" else ""
    return f"rank {rank} was killed by {name}{memory}; the same command resumes from the last checkpoint"


def _start_rank(handler: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a rank that dies with this process from its start on, not only after it has imported torch."""
    set_death_signal = partial(die_with_parent, os.getpid())
    return subprocess.Popen(
        args,
        env=env,
        stdout=handler._stdout,
        stderr=handler._stderr,
        start_new_session=True,
        preexec_fn=set_death_signal,
    )


def _end_ranks(context: SubprocessContext, close: Callable[..., None], death_sig: signal.Signals, timeout: int) -> None:
    """End the remaining ranks after one has failed: wait for them to exit, then send SIGTERM, then SIGKILL."""
    deadline = time.monotonic() + _TO_LEAVE_S
    ranks = [handler.proc for handler in context.subprocess_handlers.values()]
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    close(context, death_sig, min(timeout, _TO_END_S))


def _forward(number: int, frame: FrameType | None) -> None:
    """Forward a stop request to every rank, as SIGUSR1 so that a keyboard's SIGINT does not reach ranks twice."""
    for rank in psutil.Process().children():
        try:
            rank.send_signal(signal.SIGUSR1)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
