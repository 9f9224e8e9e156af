"""Everybody who watches a stage: the records, a progress bar, TensorBoard, Weights & Biases.

All of them hear the same typed records, on rank 0 alone; a tracker that fails never stops the training.
"""

import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megagrow import records
from megagrow.config import Family
from megagrow.config.paths import StagePaths
from megagrow.log import get
from megagrow.records import EvalRecord, Record, StepRecord

_log = get("training")
_LINES = 20


class Observer(Protocol):
    """Hears every record of the stage."""

    def hear(self, record: Record) -> None:
        """Take note of a record."""

    def close(self) -> None:
        """The stage ends, or pauses."""


class RecordFile:
    """Appends to the stage's records.jsonl, after taking out the steps that will be done again."""

    def __init__(self, path: Path, iteration: int) -> None:
        self._path = path
        records.rewind(path, iteration if iteration else -1)

    def hear(self, record: Record) -> None:
        """Append the record."""
        records.append(self._path, record)

    def close(self) -> None:
        """Nothing is held open."""


class ProgressView:
    """A bar on a terminal, some twenty plain lines elsewhere."""

    def __init__(self, stage: str, iteration: int, iterations: int) -> None:
        self._stage, self._iterations = stage, iterations
        self._every = max(1, iterations // _LINES)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(stage, total=iterations, completed=iteration, text="")
            self._bar.start()

    def hear(self, record: Record) -> None:
        """Show steps and validation losses."""
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
        """Take the bar down."""
        if self._bar:
            self._bar.stop()


class TensorBoard:
    """Scalars over iterations; on resume the steps that are done again are purged."""

    def __init__(self, directory: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=iteration + 1 if iteration else None)

    def hear(self, record: Record) -> None:
        """Write the record's numbers."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.iteration)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """One group a family, one run a stage; the run's id is kept over restarts. Offline where there is no key."""

    def __init__(self, family: Family, stage: str, paths: StagePaths, lineage: Sequence[Any]) -> None:
        import wandb

        keyed = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
        settings = family.trackers.wandb
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", settings.project),
            entity=os.environ.get("WANDB_ENTITY", settings.entity),
            group=os.environ.get("WANDB_RUN_GROUP", family.name),
            name=stage,
            id=_kept_id(paths.root / "wandb_id"),
            resume="allow",
            dir=str(paths.root),
            mode=None if keyed else "offline",
            settings=wandb.Settings(quiet=True, silent=True),
            config={
                "family": family.model_dump(mode="json"),
                "stage": stage,
                "grown_from": [ancestor.model_dump(mode="json") for ancestor in lineage],
            },
        )

    def hear(self, record: Record) -> None:
        """Log the record's numbers at its iteration."""
        values = scalars(record)
        if values:
            self._run.log(values, step=record.iteration)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Finish the run; a later process goes on with the same id."""
        self._run.finish()


class Tracker:
    """A tracker at arm's length: when it fails, people hear of it once, and the training goes on without it."""

    def __init__(self, name: str, make: Callable[[], Observer]) -> None:
        """Args: its name, for the warning, and what makes it."""
        self._name = name
        self._member: Observer | None = None
        with self._spared():
            self._member = make()

    def hear(self, record: Record) -> None:
        """Tell it, if it still works."""
        if self._member is not None:
            with self._spared():
                self._member.hear(record)

    def close(self) -> None:
        """Close it, if it still works."""
        if self._member is not None:
            with self._spared():
                self._member.close()

    @contextmanager
    def _spared(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker may raise: a full disk, a lost network, a missing package
            self._member = None
            _log.warning("%s failed and is left out from here on: %s: %s", self._name, type(error).__name__, error)


def scalars(record: Record) -> dict[str, float]:
    """Numbers of a step or validation record, under the names that trackers show."""
    if isinstance(record, StepRecord):
        return {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate,
            "train/tokens_per_second": record.tokens_per_second,
            "family/consumed_tokens": record.consumed_tokens,
        }
    if isinstance(record, EvalRecord):
        return {"validation/loss": record.loss, "family/consumed_tokens": record.consumed_tokens}
    return {}


class Observers:
    """All observers of a stage; none on ranks other than 0."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = tuple(members)

    def hear(self, record: Record) -> None:
        """Tell all."""
        for member in self._members:
            member.hear(record)

    def close(self) -> None:
        """Close all."""
        for member in self._members:
            member.close()


def observe(
    family: Family, index: int, paths: StagePaths, iteration: int, iterations: int, lineage: Sequence[Any]
) -> Observers:
    """The observers that a family asks for; called on rank 0."""
    stage = family.stages[index].name
    members: list[Observer] = [RecordFile(paths.records, iteration), ProgressView(stage, iteration, iterations)]
    if family.trackers.tensorboard:
        members.append(Tracker("TensorBoard", lambda: TensorBoard(paths.root / "tensorboard", iteration)))
    if family.trackers.wandb.enabled:
        members.append(Tracker("Weights & Biases", lambda: WeightsAndBiases(family, stage, paths, lineage)))
    return Observers(members)


def _kept_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
