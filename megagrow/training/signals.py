"""Turns a request to stop into a flag: the current step finishes, its state is saved, and only then the process exits.

SIGTERM comes from preemption or a user, SIGUSR1 from Slurm before the time limit, SIGINT from the keyboard; the
training loop itself requests a stop when its time is nearly up (`deadline`). Any rank may receive the request: the
flag is reduced together with every step's loss.
"""

import signal
from types import FrameType

from megagrow.log import get

_log = get("training")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Installs the signal handlers; true once a stop was requested."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def __bool__(self) -> bool:
        return self._reason is not None

    @property
    def reason(self) -> str:
        """What requested the stop first, for messages: a signal, the time limit, or another rank."""
        return self._reason or "another rank"

    def request(self, reason: str) -> None:
        """Request a stop after the current step."""
        if self._reason is None:
            self._reason = reason
            _log.warning("%s: finishing this step, saving, leaving", self._reason)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
