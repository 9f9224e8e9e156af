"""Nothing hangs: a thread knows what this rank is doing and since when, and ends the process when that takes too long.

A rank whose peer is dead, stopped or cut off waits inside a collective, where no exception reaches it. Past the limit
this thread shows where every thread stands, says in one line which part of the work is stuck, and leaves with `HUNG`;
torchrun then takes the other ranks down. Should the interpreter itself be held, a timer in C, a little later, does the
same without the line.
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
"""What comes before the first step may take this long whatever the limit: a file system may be slow for some ranks."""
_LOOKS = 20
"""How often within the limit the thread looks."""
_LATER = 1.5
"""The timer in C goes off after so many limits."""


class Watchdog:
    """Watches the calling process from the first `begin` to `close`."""

    def __init__(self, seconds: float, rank: int, end: Callable[[int], None] = os._exit) -> None:
        """Args: longest time that a part of the work may take; this rank, for the line; what ends the process."""
        self._limit, self._rank, self._end = seconds, rank, end
        self._now: tuple[str, float, float] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, what: str, at_least: float = 0.0) -> None:
        """The part of the work that begins now, for people: `step 12`; the one before has ended.

        Args:
            what: its name.
            at_least: seconds that it may take, if the limit is less.
        """
        limit = max(self._limit, at_least)
        self._now = (what, time.monotonic(), limit)
        # by number: sys.stderr may not be a file
        faulthandler.dump_traceback_later(limit * _LATER, exit=True, file=2)

    def close(self) -> None:
        """Watch no longer."""
        self._now = None
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / _LOOKS)):
            now = self._now
            if now is not None and time.monotonic() - now[1] > now[2]:
                self._bark(*now)
                return

    def _bark(self, what: str, since: float, limit: float) -> None:
        """Stacks first, so that the line is the last thing on the screen."""
        faulthandler.dump_traceback(file=2, all_threads=True)
        line = (
            f"megagrow: error: rank {self._rank}: {what} has not ended after {time.monotonic() - since:.0f} s "
            f"(training.hang_timeout_seconds={limit:g}): another rank, the network or the disk is stuck; "
            "this process ends, and the same command goes on from the last checkpoint\n"
        )
        sys.stderr.flush()
        os.write(2, line.encode())
        self._end(HUNG)
