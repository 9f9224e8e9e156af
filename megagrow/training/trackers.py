"""Sends the family's records to TensorBoard and Weights & Biases.

Each family is a group and each stage a run. The run's id is stored in the stage's directory, so a restarted stage
continues its own run, and a grown stage refers to its parent's. The growth itself is an event at iteration 0. Without a
key W&B does not use the network: it writes its files into the stage's directory, for `wandb sync`. A tracker that
fails is disabled.
"""

import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from megagrow.checkpoint.directory import Ancestor
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths, StagePaths
from megagrow.files.atomic import write_atomically
from megagrow.log import get
from megagrow.records import EvalRecord, Record, StepRecord

_log = get("training")
_SERVER = "https://api.wandb.ai"


class Observer(Protocol):
    """Receives every record of the stage."""

    def on_record(self, record: Record) -> None:
        """Handle a record."""

    def close(self) -> None:
        """Release resources: the stage has finished, stopped or rolled back."""


class TensorBoard:
    """Scalars by iteration; those that will be written again are purged, and growth is a text at iteration 0."""

    def __init__(self, directory: Path, iteration: int, growth: Mapping[str, Any]) -> None:
        """Args: the stage's directory, the same across restarts; the iteration to resume from; `growth_summary`."""
        from torch.utils.tensorboard import SummaryWriter

        # validation is repeated at iteration 0, but not at a later checkpoint
        self._writer: Any = SummaryWriter(str(directory), purge_step=iteration + 1 if iteration else 0)
        if growth and iteration == 0:
            self._writer.add_text("growth", ", ".join(f"{name} {value}" for name, value in growth.items()), 0)

    def on_record(self, record: Record) -> None:
        """Write the record's numbers at its iteration."""
        iteration, values = scalars(record)
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close the writer."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run. WANDB_* variables override the family.yaml; offline where there is no key."""

    def __init__(self, family: Family, index: int, iteration: int, lineage: Sequence[Ancestor]) -> None:
        """Args: family and stage index; the iteration to resume from; growth steps of the stage, oldest first."""
        import wandb

        paths, stage = FamilyPaths(family), family.stages[index].name
        settings, root = family.trackers.wandb, paths.stage(index).root
        growth, parent = growth_summary(lineage), None
        mode: Any = os.environ.get("WANDB_MODE") or (None if has_wandb_key(os.environ) else "offline")
        if growth and index and lineage[-1].stage == family.stages[index - 1].name:
            parent = read_run_id(paths.stage(index - 1))
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", settings.project),
            entity=os.environ.get("WANDB_ENTITY", settings.entity),
            group=os.environ.get("WANDB_RUN_GROUP", family.name),
            name=" ".join(filter(None, (os.environ.get("WANDB_NAME"), stage))),
            id=read_run_id(paths.stage(index)) or _draw_run_id(paths.stage(index)),
            resume=None if mode == "offline" else "allow",  # offline the id alone is enough
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

    def on_record(self, record: Record) -> None:
        """Log the record's numbers at its iteration."""
        iteration, values = scalars(record)
        if values:
            self._run.log(values, step=iteration)

    def close(self) -> None:
        """Finish the run; a later process continues it under the same id."""
        self._run.finish()


class GuardedTracker:
    """Isolates training from a tracker: on its first failure it logs one warning and disables the tracker."""

    def __init__(self, name: str, make: Callable[[], Observer]) -> None:
        """Args: name of the tracker, for the warning; factory of the tracker."""
        self._name = name
        self._member: Observer | None = None
        with self._guarded():
            self._member = make()

    def on_record(self, record: Record) -> None:
        """Pass the record on, if the tracker still works."""
        if self._member is not None:
            with self._guarded():
                self._member.on_record(record)

    def close(self) -> None:
        """Close the tracker, if it still works."""
        if self._member is not None:
            with self._guarded():
                self._member.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker may raise anything: full disk, lost network, missing package
            self._member = None
            _log.warning("%s failed and is disabled from here on: %s: %s", self._name, type(error).__name__, error)


def make_trackers(family: Family, index: int, iteration: int, lineage: Sequence[Ancestor]) -> list[GuardedTracker]:
    """Create the trackers enabled by a family; called on rank 0."""
    found, board = [], FamilyPaths(family).stage(index).root / "tensorboard"
    if family.trackers.tensorboard:
        found.append(GuardedTracker("TensorBoard", lambda: TensorBoard(board, iteration, growth_summary(lineage))))
    if family.trackers.wandb.enabled:
        found.append(GuardedTracker("Weights & Biases", lambda: WeightsAndBiases(family, index, iteration, lineage)))
    return found


def growth_summary(lineage: Sequence[Ancestor]) -> dict[str, Any]:
    """Describe the last growth step of a lineage; empty for a stage that was not grown."""
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


def scalars(record: Record) -> tuple[int, dict[str, float]]:
    """Iteration and numbers of a step or validation record, under the trackers' names; no loss of a skipped step."""
    if isinstance(record, StepRecord):
        if record.skipped:
            return record.iteration, {"train/skipped": 1, "family/consumed_tokens": record.consumed_tokens}
        return record.iteration, {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/learning_rate": record.learning_rate,
            "train/tokens_per_second": record.tokens_per_second,
            "family/consumed_tokens": record.consumed_tokens,
        }
    if isinstance(record, EvalRecord):
        return record.iteration, {"validation/loss": record.loss, "family/consumed_tokens": record.consumed_tokens}
    return 0, {}


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B can log in with a key or token file from the environment, or the server's entry in ~/.netrc."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(environment.get("WANDB_BASE_URL", _SERVER)).hostname or ""
    try:
        return netrc.netrc(environment.get("NETRC")).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_run_id(paths: StagePaths) -> str | None:
    """Return the run id of a stage; None before its first run."""
    file = paths.wandb_id
    return (file.read_text().strip() or None) if file.is_file() else None


def _draw_run_id(paths: StagePaths) -> str:
    """Draw an id and store it by one rename: half an id would be a different run."""
    run_id = uuid.uuid4().hex[:12]
    write_atomically(paths.wandb_id, run_id)
    return run_id
