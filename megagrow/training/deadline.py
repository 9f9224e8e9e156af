"""No step is begun that could not end: how much of an allotment of time is left, in steps.

Ranks agree to stop once a step, in the same reduction as the loss. So when a step begins it is asked whether *one
more* would still fit behind it, with its validation and the save: if not, this step is the last. The first step of
a process is always taken, because nothing is known before it and a job that is started again must get somewhere.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from megagrow.slurm_step import END_OF_JOB

_RECENT = 32
_CAUTION = 1.25
"""Anything may take so much longer than it recently took at most."""


def end_of_time(limit_minutes: float | None, started: float, environment: Mapping[str, str]) -> float | None:
    """When this process must be gone, in seconds since the epoch; None: never.

    Args:
        limit_minutes: `training.time_limit_minutes`.
        started: when the process was started.
        environment: where Slurm says when the job ends.
    """
    ends = [] if limit_minutes is None else [started + 60 * limit_minutes]
    if environment.get(END_OF_JOB, "").isdecimal():
        ends.append(float(environment[END_OF_JOB]))
    return min(ends, default=None)


class Deadline:
    """Remembers how long steps, validations and saves took lately, in seconds."""

    def __init__(self, end: float | None, *, save: float, clock: Callable[[], float] = time.time) -> None:
        """Args: when to be gone (`end_of_time`); a guess at a save, until one is measured; what tells the time."""
        self._end, self._clock, self._guess = end, clock, save
        self._steps, self._validations, self._saves = (deque[float](maxlen=_RECENT) for _ in range(3))

    def took(self, *, step: float | None = None, validation: float | None = None, save: float | None = None) -> None:
        """Something took so many seconds."""
        for seconds, known in ((step, self._steps), (validation, self._validations), (save, self._saves)):
            if seconds is not None:
                known.append(seconds)

    def leaves_room(self) -> bool:
        """Whether, after the step that begins now, another one with a validation and a save could end in time."""
        if self._end is None:
            return True
        needed = 2 * max(self._steps, default=0.0)
        needed += max(self._validations, default=0.0) + max(self._saves, default=self._guess)
        return self._clock() + _CAUTION * needed < self._end
