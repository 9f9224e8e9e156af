"""The observers of a stage: its records file, a progress bar, and the trackers (`trackers`).

All of them receive the same typed records, on rank 0 only; a tracker that fails never stops the training.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megagrow import records
from megagrow.checkpoint.directory import Ancestor
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.log import get
from megagrow.records import EvalRecord, Record, RollBackRecord, StepRecord
from megagrow.training.trackers import Observer, make_trackers

_log = get("training")
_LINES = 20


class RecordFile:
    """Appends to the stage's records.jsonl, after removing the records of steps that will be repeated."""

    def __init__(self, path: Path, iteration: int, *, rolled_back: bool) -> None:
        """Args: the file; the iteration to resume from; whether to keep roll-back records, as after a roll back."""
        self._path = path
        records.rewind(path, iteration if iteration else -1, spare=(RollBackRecord,) if rolled_back else ())

    def on_record(self, record: Record) -> None:
        """Append the record."""
        records.append(self._path, record)

    def close(self) -> None:
        """Do nothing: the file is not kept open."""


class ProgressView:
    """A progress bar on a terminal, about twenty plain log lines elsewhere."""

    def __init__(self, stage: str, iteration: int, iterations: int) -> None:
        self._stage, self._iterations = stage, iterations
        self._every = max(1, iterations // _LINES)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(stage, total=iterations, completed=iteration, text="")
            self._bar.start()

    def on_record(self, record: Record) -> None:
        """Show a step or a validation loss."""
        if isinstance(record, StepRecord):
            text = (
                f"loss {record.loss:.4f}  lr {record.learning_rate:.2e}  "
                f"grad {record.grad_norm:.2f}  {record.tokens_per_second:,.0f} tok/s"
            )
            if self._bar:
                self._bar.update(self._task, completed=record.iteration, text=text)
            elif record.iteration % self._every == 0 or record.iteration == self._iterations:
                _log.info("%s %d/%d  %s", self._stage, record.iteration, self._iterations, text)
        elif isinstance(record, EvalRecord):
            _log.info("%s %d/%d  validation loss %.5f", self._stage, record.iteration, self._iterations, record.loss)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()


class Observers:
    """All observers of a stage; ranks other than 0 have none."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = tuple(members)

    def on_record(self, record: Record) -> None:
        """Pass the record to every observer."""
        for member in self._members:
            member.on_record(record)

    def close(self) -> None:
        """Close every observer."""
        for member in self._members:
            member.close()


def make_observers(
    family: Family, index: int, iteration: int, iterations: int, lineage: Sequence[Ancestor], *, rolled_back: bool
) -> Observers:
    """Create the observers configured by a family; called on rank 0.

    Args:
        family, index: the family, and the index of the stage.
        iteration: iteration to resume from.
        iterations: last iteration.
        lineage: growth steps of the stage, oldest first.
        rolled_back: whether this process rolled back to `iteration` after a step that was not finite.
    """
    file = RecordFile(FamilyPaths(family).stage(index).records, iteration, rolled_back=rolled_back)
    view = ProgressView(family.stages[index].name, iteration, iterations)
    return Observers([file, view, *make_trackers(family, index, iteration, lineage)])
