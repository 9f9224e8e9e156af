"""The record of what a stage is, and how it is read from checkpoints that are older than it.

Its settings are plain JSON under the names of family.yaml, so later versions can add to them: a setting that one of two
histories lacks is not compared, or compared with its default where this version has one.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import megagrow

State = Literal["grown", "training", "finished"]


class Origin(BaseModel):
    """The checkpoint that a stage was loaded from at its begin; `sha256` is that of its integrity.json, or empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    family: str
    stage: str
    iteration: int


class Change(BaseModel):
    """A setting that was changed, as is allowed, after an iteration of the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iteration: int
    key: str
    before: Any
    after: Any


class StageHistory(BaseModel):
    """What a stage is.

    Attributes:
        state: grown (iteration 0, nothing trained), training, or finished (all planned steps taken).
        iteration: steps taken.
        tokens, flops: really spent on this stage so far: with the steps that a roll back passed over, without those
            that were lost in a kill and repeated.
        settings: what made the weights, under the names of family.yaml: name, seed, data, tokenizer, model, growth,
            batch, precision, schedule, max_lr, iterations, parallel, recompute_granularity; a grown stage that was not
            trained has only those that growth used. `prepared` has the number of tokens of each source.
        origin: what the stage was loaded from at its begin; None for fresh weights.
        changes: allowed changes of the settings, oldest first.
        version: version of megagrow that wrote it; empty if it was made from an older manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    state: State
    iteration: int
    tokens: int
    flops: float
    settings: dict[str, Any]
    origin: Origin | None = None
    changes: tuple[Change, ...] = ()
    version: str = megagrow.__version__

    @property
    def iterations(self) -> int | None:
        """Planned number of steps; None if it is not known."""
        return self.settings.get("iterations")


def history_of_manifest(manifest: Mapping[str, Any]) -> StageHistory:
    """The history in a checkpoint's manifest, or what an older manifest has of it.

    An older one has no batch, data and recomputation, and seed and growth only of a grown stage; those are then not
    compared. Its tokens follow from its FLOPs, so they are 0 here until the stage is trained on.

    Raises:
        KeyError, TypeError, ValueError: it is not a manifest of megagrow.
    """
    if manifest.get("history") is not None:
        return StageHistory.model_validate(manifest["history"])
    iteration = int(manifest["iteration"])
    settings = {"model": manifest["shape"], "precision": manifest["precision"], "parallel": manifest["layout"]}
    schedule = dict(manifest.get("schedule") or {})
    settings |= {key: schedule.pop(key) for key in ("max_lr", "iterations") if key in schedule}
    if schedule:
        settings["schedule"] = schedule
    origin = None
    if manifest.get("lineage"):
        parent = manifest["lineage"][-1]
        origin = Origin(**{key: parent[key] for key in Origin.model_fields})
        settings |= {"growth": parent["options"], "seed": parent["seed"]}
    state: State = "training" if iteration or origin is None else "grown"
    if iteration and iteration >= settings.get("iterations", iteration + 1):
        state = "finished"
    return StageHistory(
        state=state,
        iteration=iteration,
        tokens=0,
        flops=float(manifest["flops"]),
        settings=settings,
        origin=origin,
        version="",
    )
