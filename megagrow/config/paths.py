"""Where a family keeps what: the one place that knows.

<save>/data/                     tokenizer and .bin/.idx; prepared.json, written last, says that they are whole
<save>/lock                      held by the one `megagrow run` or `launch` that works here
<save>/records.jsonl             jobs and conversions
<save>/report.html
<save>/jobs/                     scripts and logs of a cluster's jobs, and the family as it was launched
<save>/<stage>/checkpoints/      iter_XXXXXXX/ and the tracker
<save>/<stage>/huggingface/      the trained stage in that format, where the family asks for it
<save>/<stage>/records.jsonl     steps and validation losses
<save>/<stage>/lock              held by whoever trains the stage
<save>/<stage>/wandb_id          the id of its W&B run, kept over restarts
"""

from dataclasses import dataclass
from pathlib import Path

from megagrow.config.family import Family
from megagrow.tracker import TRACKER

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class StagePaths:
    """Places of one stage."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Megatron's `--save` directory."""
        return self.root / CHECKPOINTS

    def exported(self, to: str) -> Path:
        """The stage in another format."""
        return self.root / to

    @property
    def records(self) -> Path:
        """Records of steps and validation."""
        return self.root / "records.jsonl"

    @property
    def lock(self) -> Path:
        """Held by whoever writes the stage."""
        return self.root / "lock"

    @property
    def first_checkpoint(self) -> Path:
        """Iteration 0: what a conversion into the stage writes."""
        return self.checkpoints / "iter_0000000"

    @property
    def wandb_id(self) -> Path:
        """The id of the stage's W&B run."""
        return self.root / "wandb_id"

    def last_iteration(self) -> int | None:
        """The tracker's iteration: what decides whether a stage is finished; None before its first checkpoint."""
        tracker = self.checkpoints / TRACKER
        text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
        return int(text) if text.isdecimal() else None


@dataclass(frozen=True)
class FamilyPaths:
    """Places of a family."""

    family: Family

    @property
    def records(self) -> Path:
        """Records of jobs and conversions."""
        return self.family.save / "records.jsonl"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.family.save / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the one run or launch that works on the family."""
        return self.family.save / "lock"

    @property
    def data(self) -> Path:
        """The tokenizer and the tokens."""
        return self.family.save / "data"

    @property
    def prepared(self) -> Path:
        """Written last when data is prepared: what it was made from."""
        return self.data / "prepared.json"

    @property
    def jobs(self) -> Path:
        """Scripts, logs and the family of a launch on a cluster."""
        return self.family.save / "jobs"

    def stage(self, index: int) -> StagePaths:
        """Places of a stage."""
        return StagePaths(self.family.save / self.family.stages[index].name)
