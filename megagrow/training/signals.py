"""A request to stop becomes a flag: the step in hand is finished, the state saved, and only then the process leaves.

SIGTERM comes with preemption and from a person, SIGUSR1 from Slurm before the time limit, SIGINT from a keyboard; the
loop itself asks when its time is nearly up (`deadline`). Which rank was told does not matter: the flag is reduced
with every step's loss.
"""

import signal
from types import FrameType

from megagrow.log import get

_log = get("training")
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Installs the handlers; true once somebody asked."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}

    def __bool__(self) -> bool:
        return self._name is not None

    @property
    def name(self) -> str:
        """Who asked first, for messages: a signal, or the loop."""
        return self._name or "another rank"

    def ask(self, name: str) -> None:
        """Ask to stop after this step; `name` says who asks."""
        if self._name is None:
            self._name = name
            _log.warning("%s: finishing this step, saving, leaving", self._name)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
