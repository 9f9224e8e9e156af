"""Never starts a step that cannot finish in time: compares the time left with recent step, validation and save times.

Ranks agree to stop once a step, in the same reduction as the loss. So before a step starts, it must be known whether
*one more* step, with its validation and the save, would still fit after it; if not, this step is the last. The first
step of a process is always taken: nothing has been measured before it, and a restarted job must make progress.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from megagrow.slurm_step import JOB_END_TIME

_RECENT = 32
_SAFETY_FACTOR = 1.25
"""The next step, validation and save are assumed to take at most this multiple of their recent maximum."""


def exit_time(limit_minutes: float | None, started: float, environment: Mapping[str, str]) -> float | None:
    """Return when this process must have exited, in seconds since the epoch; None where there is no limit.

    Args:
        limit_minutes: `training.time_limit_minutes`.
        started: start time of the process.
        environment: variables in which Slurm gives the end of the job.
    """
    ends = [] if limit_minutes is None else [started + 60 * limit_minutes]
    if environment.get(JOB_END_TIME, "").isdecimal():
        ends.append(float(environment[JOB_END_TIME]))
    return min(ends, default=None)


class Deadline:
    """Records how long recent steps, validations and saves took, in seconds."""

    def __init__(self, end: float | None, *, save: float, clock: Callable[[], float] = time.time) -> None:
        """Args: end, from `exit_time`; save, a guess used until a save has been measured; clock, the current time."""
        self._end, self._clock, self._guess = end, clock, save
        self._steps, self._validations, self._saves = (deque[float](maxlen=_RECENT) for _ in range(3))

    def record_times(
        self, *, step: float | None = None, validation: float | None = None, save: float | None = None
    ) -> None:
        """Record measured durations in seconds."""
        for seconds, recent in ((step, self._steps), (validation, self._validations), (save, self._saves)):
            if seconds is not None:
                recent.append(seconds)

    def allows_another_step(self) -> bool:
        """Whether, after the step that starts now, another one with a validation and a save would finish in time."""
        if self._end is None:
            return True
        needed = 2 * max(self._steps, default=0.0)
        needed += max(self._validations, default=0.0) + max(self._saves, default=self._guess)
        return self._clock() + _SAFETY_FACTOR * needed < self._end
