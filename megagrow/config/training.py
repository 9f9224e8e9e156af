"""How training meets what goes wrong: hangs, losses that are not finite, and the end of an allotment."""

from typing import Literal

from pydantic import Field

from megagrow.config.base import Section


class Training(Section):
    """What survives, and what ends the process."""

    hang_timeout_seconds: float = Field(
        1800.0, ge=1, description="a step, a save, a load or a validation that takes longer is stuck: the job ends"
    )
    non_finite: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="a step whose loss or gradient norm is not finite never reaches the weights; then: stop; skip it "
        "and go on with the next samples; or go back to the last checkpoint and go on with the next samples from there",
    )
    non_finite_limit: int = Field(
        3, gt=0, description="skip: at most so many steps in a row; roll_back: at most so many times in a stage"
    )
    time_limit_minutes: float | None = Field(
        None, gt=0, description="of a process, from its start; default: Slurm's SLURM_JOB_END_TIME, else none"
    )
