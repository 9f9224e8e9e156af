"""The layout of a family's directory, defined here only (the names themselves are in `file_names`).

<save>/data/                     tokenizer and .bin/.idx; prepared.json is written last, once they are complete
<save>/lock                      held by the one `megagrow run` or `launch` at work on the family
<save>/records.jsonl             jobs and conversions
<save>/report.html
<save>/jobs/                     scripts and logs of cluster jobs, and the family as launched
<save>/<stage>/checkpoints/      iter_XXXXXXX/ and the tracker; ahead/ with iterations that training went back behind
<save>/<stage>/huggingface/      the trained stage in that format, if the family exports it
<save>/<stage>/records.jsonl     steps and validation losses
<save>/<stage>/history.json      what the stage is being made with, from its begin to its first checkpoint
<save>/<stage>/lock              held by the process that trains the stage
<save>/<stage>/wandb_id          id of its W&B run, kept across restarts
"""

from dataclasses import dataclass
from pathlib import Path

from megagrow.config.family import Family
from megagrow.config.file_names import CHECKPOINTS, DATA, JOBS, LOCK, RECORDS, REPORT
from megagrow.tracker import MAX_TRACKER, TRACKER, iteration_in

AHEAD = "ahead"


@dataclass(frozen=True)
class StagePaths:
    """Paths of one stage."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoint directory: Megatron's `--save`."""
        return self.root / CHECKPOINTS

    @property
    def ahead(self) -> Path:
        """Directory of the iterations that were ahead of the tracker when training last went back; often missing."""
        return self.checkpoints / AHEAD

    def exported(self, to: str) -> Path:
        """Directory of the trained stage in another format."""
        return self.root / to

    @property
    def records(self) -> Path:
        """Records of training steps and validation."""
        return self.root / RECORDS

    @property
    def history(self) -> Path:
        """What the stage is made with; its checkpoints have this too, and decide."""
        return self.root / "history.json"

    @property
    def lock(self) -> Path:
        """Lock file, held by the process that writes to the stage."""
        return self.root / LOCK

    @property
    def first_checkpoint(self) -> Path:
        """Iteration 0, which a conversion into the stage writes."""
        return self.checkpoints / "iter_0000000"

    @property
    def wandb_id(self) -> Path:
        """File with the id of the stage's W&B run."""
        return self.root / "wandb_id"

    def contains_checkpoint(self, path: str) -> bool:
        """Whether a path that was recorded, perhaps before the family was moved, is one of this stage's checkpoints."""
        return Path(path).parts[-3:-1] == (self.root.name, CHECKPOINTS)

    def last_iteration(self) -> int | None:
        """Iteration in the tracker, which decides whether the stage is finished; None before its first checkpoint."""
        tracker = self.checkpoints / TRACKER
        if not tracker.is_file():
            return None
        with open(tracker, encoding="utf-8", errors="replace") as stream:
            return iteration_in(stream.read(MAX_TRACKER))


@dataclass(frozen=True)
class FamilyPaths:
    """Paths of a family."""

    family: Family

    @property
    def records(self) -> Path:
        """Records of jobs and conversions."""
        return self.family.save / RECORDS

    @property
    def report(self) -> Path:
        """The report page."""
        return self.family.save / REPORT

    @property
    def lock(self) -> Path:
        """Lock file, held by the one run or launch at work on the family."""
        return self.family.save / LOCK

    @property
    def data(self) -> Path:
        """Directory of the tokenizer and the tokens."""
        return self.family.save / DATA

    @property
    def prepared(self) -> Path:
        """Record of what the data was prepared from, written last."""
        return self.data / "prepared.json"

    @property
    def jobs(self) -> Path:
        """Directory of a launch on a cluster: scripts, logs, and the family as launched."""
        return self.family.save / JOBS

    def stage(self, index: int) -> StagePaths:
        """Paths of a stage."""
        return StagePaths(self.family.save / self.family.stages[index].name)
