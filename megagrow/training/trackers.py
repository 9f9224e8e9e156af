"""TensorBoard and Weights & Biases: the family's records where people look at curves.

One group a family, one run a stage. A run's id lies in the stage's directory, so a stage that is started again goes on
in its own run, and a grown stage names its parent's. How it was grown is an event at iteration 0. No key, no network:
without a key W&B writes its files into the stage's directory, for `wandb sync`. A tracker that fails is left out.
"""

import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from megagrow.atomic import write_whole
from megagrow.checkpoint.directory import Ancestor
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths, StagePaths
from megagrow.log import get
from megagrow.records import EvalRecord, Record, StepRecord

_log = get("training")
_SERVER = "https://api.wandb.ai"


class Observer(Protocol):
    """Hears every record of the stage."""

    def hear(self, record: Record) -> None:
        """Take note of a record."""

    def close(self) -> None:
        """The stage ends, or pauses."""


class TensorBoard:
    """Scalars over iterations; what will be done again is purged, and growth is a text at iteration 0."""

    def __init__(self, directory: Path, iteration: int, growth: Mapping[str, Any]) -> None:
        """Args: the stage's directory, the same over restarts; where it goes on; `growth_event`."""
        from torch.utils.tensorboard import SummaryWriter

        # validation at iteration 0 is done again, that of a later checkpoint is not
        self._writer: Any = SummaryWriter(str(directory), purge_step=iteration + 1 if iteration else 0)
        if growth and iteration == 0:
            self._writer.add_text("growth", ", ".join(f"{name} {value}" for name, value in growth.items()), 0)

    def hear(self, record: Record) -> None:
        """Write the record's numbers."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.iteration)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B. WANDB_* variables come before the family.yaml; offline where there is no key."""

    def __init__(self, family: Family, index: int, iteration: int, lineage: Sequence[Ancestor]) -> None:
        """Args: family and stage; where it goes on; its growth steps, oldest first."""
        import wandb

        paths, stage = FamilyPaths(family), family.stages[index].name
        settings, root = family.trackers.wandb, paths.stage(index).root
        growth, parent = growth_event(lineage), None
        mode: Any = os.environ.get("WANDB_MODE") or (None if has_key(os.environ) else "offline")
        if growth and index and lineage[-1].stage == family.stages[index - 1].name:
            parent = read_id(paths.stage(index - 1))
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", settings.project),
            entity=os.environ.get("WANDB_ENTITY", settings.entity),
            group=os.environ.get("WANDB_RUN_GROUP", family.name),
            name=" ".join(filter(None, (os.environ.get("WANDB_NAME"), stage))),
            id=read_id(paths.stage(index)) or _new_id(paths.stage(index)),
            resume=None if mode == "offline" else "allow",  # offline the id alone does it
            dir=str(root),
            mode=mode,
            settings=wandb.Settings(quiet=True, silent=True),
            config={
                "family": family.model_dump(mode="json"),
                "stage": stage,
                "grown_from": [ancestor.model_dump(mode="json") for ancestor in lineage],
                "parent_run": parent,
            },
        )
        if growth:
            self._run.summary.update({f"growth/{name}": value for name, value in growth.items()})
            self._run.summary["growth/parent_run"] = parent
            if iteration == 0:
                self._run.log({"growth": 1, "growth/parent_iteration": lineage[-1].iteration}, step=0)

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


def trackers(family: Family, index: int, iteration: int, lineage: Sequence[Ancestor]) -> list[Tracker]:
    """The trackers that a family asks for; called on rank 0."""
    found, board = [], FamilyPaths(family).stage(index).root / "tensorboard"
    if family.trackers.tensorboard:
        found.append(Tracker("TensorBoard", lambda: TensorBoard(board, iteration, growth_event(lineage))))
    if family.trackers.wandb.enabled:
        found.append(Tracker("Weights & Biases", lambda: WeightsAndBiases(family, index, iteration, lineage)))
    return found


def growth_event(lineage: Sequence[Ancestor]) -> dict[str, Any]:
    """How a stage was grown, by the last step of its lineage; empty for one that was not."""
    if not lineage:
        return {}
    last = lineage[-1]
    return {
        "parent": last.stage,
        "parent_iteration": last.iteration,
        "operators": " ".join(f"{axis}={name}" for axis, name in last.operators.items()),
        "moments": last.moments,
        "exact": last.exact,
    }


def scalars(record: Record) -> dict[str, float]:
    """Numbers of a step or validation record, under the names that trackers show; none of a step that was skipped."""
    if isinstance(record, StepRecord):
        if record.skipped:
            return {"train/skipped": 1, "family/consumed_tokens": record.consumed_tokens}
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


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B could log in: by a key or a token file in the environment, or the server's entry in ~/.netrc."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(environment.get("WANDB_BASE_URL", _SERVER)).hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_id(paths: StagePaths) -> str | None:
    """The id of a stage's run; None before its first."""
    file = paths.wandb_id
    return (file.read_text().strip() or None) if file.is_file() else None


def _new_id(paths: StagePaths) -> str:
    """Draw an id and keep it, by one rename: half an id would be another run."""
    drawn = uuid.uuid4().hex[:12]
    write_whole(paths.wandb_id, drawn)
    return drawn
