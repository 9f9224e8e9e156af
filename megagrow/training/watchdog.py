"""Ends a process that hangs: a thread tracks which part of the work this rank is in and for how long.

A rank whose peer is dead, stopped or cut off waits inside a collective, where no exception reaches it. Past the limit
this thread prints the stack of every thread, reports in one line which part of the work is stuck, and exits with
`HUNG`; torchrun then ends the other ranks. If the interpreter itself is blocked, a timer in C, slightly later, does
the same without the line.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

HUNG = 70
"""Exit code of a rank that was stuck (EX_SOFTWARE of sysexits.h)."""
START_S = 300.0
"""Minimum limit for each part before the first step: a file system may be slow for some ranks."""
_CHECKS_PER_LIMIT = 20
_C_TIMER_FACTOR = 1.5
"""The timer in C fires after this multiple of the limit."""


class Watchdog:
    """Watches the calling process from the first `begin` until `close`."""

    def __init__(self, seconds: float, rank: int, end: Callable[[int], None] = os._exit) -> None:
        """Args: seconds, the limit for one part of the work; rank, shown in the error line; end, exits the process."""
        self._limit, self._rank, self._end = seconds, rank, end
        self._now: tuple[str, float, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, what: str, at_least: float = 0.0) -> None:
        """Start timing a part of the work; the previous part has ended.

        Args:
            what: its name in the error line, such as `step 12`.
            at_least: its limit in seconds, if this is more than the watchdog's own.
        """
        limit = max(self._limit, at_least)
        self._now = (what, time.monotonic(), limit)
        # by descriptor number: sys.stderr may not be a file
        faulthandler.dump_traceback_later(limit * _C_TIMER_FACTOR, exit=True, file=2)

    def close(self) -> None:
        """Stop watching."""
        self._now = None
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / _CHECKS_PER_LIMIT)):
            now = self._now
            if now is not None and time.monotonic() - now[1] > now[2]:
                self._report_and_exit(*now)
                return

    def _report_and_exit(self, what: str, since: float, limit: float) -> None:
        """Print the stacks first, so that the error line is the last line on the screen."""
        faulthandler.dump_traceback(file=2, all_threads=True)
        line = (
            f"megagrow: error: rank {self._rank}: {what} has not ended after {time.monotonic() - since:.0f} s "
            f"(training.hang_timeout_seconds={limit:g}): another rank, the network or the disk is stuck; "
            "this process exits, and the same command resumes from the last checkpoint\n"
        )
        sys.stderr.flush()
        os.write(2, line.encode())
        self._end(HUNG)
