"""Policy for steps whose loss or gradient norm is not finite.

Such a step does no harm: it never reached weights or moments, on any rank. The family's settings decide whether to
stop, skip the step or roll back, and a `Tally` of earlier ones enforces the limit. The tally is saved with every
checkpoint, so a run that is killed and restarted decides exactly as an uninterrupted one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from megagrow.config.stage import Training

TALLY_KEY = "non_finite"
"""Key of the tally in a checkpoint's unsharded state."""

Action = Literal["stop", "skip", "roll_back"]


@dataclasses.dataclass(frozen=True)
class Tally:
    """Steps skipped since the last one taken, and how often the stage rolled back to a checkpoint."""

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
        """Read the tally from a checkpoint's unsharded state; zeros if an older version or another stage wrote it."""
        return cls(**common.get(TALLY_KEY, {}))


def choose_action(training: Training, tally: Tally) -> tuple[Action, Tally]:
    """Return the action for a step that is not finite, and the tally after it."""
    if training.non_finite == "skip" and tally.skipped_in_a_row < training.non_finite_limit:
        return "skip", dataclasses.replace(tally, skipped_in_a_row=tally.skipped_in_a_row + 1)
    if training.non_finite == "roll_back" and tally.rolled_back < training.non_finite_limit:
        return "roll_back", dataclasses.replace(tally, skipped_in_a_row=0, rolled_back=tally.rolled_back + 1)
    return "stop", tally


def limit_reached(training: Training) -> str:
    """Describe, for the error, the limit that skipping or rolling back reached; empty for the policy `stop`."""
    return {
        "stop": "",
        "skip": f", after {training.non_finite_limit} skipped in a row (training.non_finite_limit)",
        "roll_back": f", after going back {training.non_finite_limit} times (training.non_finite_limit)",
    }[training.non_finite]
