"""What to do about a step whose loss or gradient norm is not finite.

The step itself is harmless: it never reached weights or moments, on any rank. The family says what comes then, and a
`Tally` of what came before, saved with every checkpoint, says whether there has been too much of it. So a run that is
killed and started again decides as the undisturbed one does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from megagrow.config.training import Training

KEY = "non_finite"
"""Under which a checkpoint keeps the tally, among what is not sharded."""

Verdict = Literal["stop", "skip", "roll_back"]


@dataclasses.dataclass(frozen=True)
class Tally:
    """Steps skipped since the last that was taken, and how often the stage went back to a checkpoint."""

    skipped_in_a_row: int = 0
    rolled_back: int = 0

    def taken(self) -> "Tally":
        """The tally after a step that was taken."""
        return dataclasses.replace(self, skipped_in_a_row=0)

    def to_dict(self) -> dict[str, int]:
        """Return plain values for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_common(cls, common: Mapping[str, Any]) -> "Tally":
        """Return the tally that a checkpoint holds; one that has none, of an older version or another stage: zeros."""
        return cls(**common.get(KEY, {}))


def judge(training: Training, tally: Tally) -> tuple[Verdict, Tally]:
    """Return what is to be done about a step that is not finite, and the tally after it."""
    if training.non_finite == "skip" and tally.skipped_in_a_row < training.non_finite_limit:
        return "skip", dataclasses.replace(tally, skipped_in_a_row=tally.skipped_in_a_row + 1)
    if training.non_finite == "roll_back" and tally.rolled_back < training.non_finite_limit:
        return "roll_back", dataclasses.replace(tally, skipped_in_a_row=0, rolled_back=tally.rolled_back + 1)
    return "stop", tally


def too_much(training: Training) -> str:
    """Why a family that bears with such steps stops nevertheless, for its error; empty where it never does."""
    return {
        "stop": "",
        "skip": f", after {training.non_finite_limit} skipped in a row (training.non_finite_limit)",
        "roll_back": f", after going back {training.non_finite_limit} times (training.non_finite_limit)",
    }[training.non_finite]
