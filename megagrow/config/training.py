"""How training handles hangs, non-finite losses, and the end of its time limit."""

from typing import Literal

from pydantic import Field

from megagrow.config.base import Section


class Training(Section):
    """Which failures training survives, and which end the process."""

    hang_timeout_seconds: float = Field(
        1800.0, ge=1, description="a step, save, load or validation that takes longer counts as hung and ends the job"
    )
    non_finite: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="a step with a non-finite loss or gradient norm never changes the weights; then: stop; skip it and "
        "continue with the next samples; or roll back to the last checkpoint and continue with the next samples there",
    )
    non_finite_limit: int = Field(3, gt=0, description="skip: most steps in a row; roll_back: most rollbacks per stage")
    time_limit_minutes: float | None = Field(
        None, gt=0, description="counted from the start of the process; default: until SLURM_JOB_END_TIME, if set"
    )
