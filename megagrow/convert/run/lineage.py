"""Manifests of converted checkpoints: what they are, and which ancestors they were grown from."""

from pathlib import Path
from typing import Any

import megagrow
from megagrow.checkpoint.directory import Ancestor, Manifest, integrity
from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.config import ModelShape, ParallelLayout
from megagrow.convert.plan import Storage
from megagrow.convert.run.target import TargetSpec
from megagrow.growth.maps import GrowthStep
from megagrow.history import Origin, StageHistory


def adopted_manifest(source: Path, opened: OpenCheckpoint, shape: ModelShape, target: TargetSpec) -> Manifest:
    """The manifest of a checkpoint that megagrow did not write, from what it records of itself."""
    arguments = opened.common.get("args")
    arguments = arguments if isinstance(arguments, dict) else {}
    iteration = opened.common.get("iteration", arguments.get("iteration", 0))
    samples = int(arguments.get("consumed_train_samples") or 0)
    return Manifest(
        family=source.resolve().parent.name or "adopted",
        stage=target.stage,
        iteration=int(iteration or 0),
        shape=shape,
        layout=opened.layout or ParallelLayout(),
        precision=target.precision,
        position={},
        consumed_samples=samples,
        consumed_tokens=samples * shape.seq_length,
        flops=0.0,
    )


def target_manifest(step: GrowthStep, source: Path, parent: Manifest, target: TargetSpec, storage: Storage) -> Manifest:
    """The target's manifest.

    A checkpoint that becomes another stage starts it at iteration 0 and continues in the data where its parent stopped,
    unless it goes on with its parent's schedule; a grown one has the parent as its last ancestor. One that is only
    resharded keeps its parent's place. Where samples have another length, places are counted in samples of that one.
    """
    layout: dict[str, Any] = {"layout": target.layout, "precision": target.precision, "version": megagrow.__version__}
    layout |= {"shape": target.shape}
    if target.shape.seq_length != parent.shape.seq_length:
        old, new = parent.shape.seq_length, target.shape.seq_length
        place = {name: count * old // new for name, count in parent.position.items()}
        layout |= {"position": place, "consumed_samples": parent.consumed_tokens // new}
    if target.load is not None:  # its data was not this family's
        layout |= {"position": {}, "consumed_samples": 0, "consumed_tokens": 0, "family": target.family}
    history, made = parent.history, _made(target)
    if target.load is None and not step.operators and not _starts_stage(parent, target):
        kept = history and history.model_copy(update={"settings": {**history.settings, **made}})
        return parent.model_copy(update={**layout, "history": kept})
    start: dict[str, Any] = {"stage": target.stage, "threads": None}
    if target.schedule == "fresh":
        start |= {"iteration": 0, "flops": 0.0, "schedule": None}
    if step.operators:
        made |= {"growth": target.growth.model_dump(mode="json"), "seed": step.seed}
        start["lineage"] = (*parent.lineage, _ancestor(step, source, parent, target, storage))
    start["history"] = StageHistory(
        state="grown",
        iteration=start.get("iteration", parent.iteration),
        tokens=0,
        flops=0.0,
        settings=made,
        origin=_origin(source, parent),
    )
    return parent.model_copy(update={**layout, **start})


def _starts_stage(parent: Manifest, target: TargetSpec) -> bool:
    """Whether a conversion without growth, into a family, makes the first checkpoint of another stage."""
    name = parent.history.settings.get("name", parent.family) if parent.history else parent.family
    return target.family is not None and (target.family, target.stage) != (name, parent.stage)


def _ancestor(step: GrowthStep, source: Path, parent: Manifest, target: TargetSpec, storage: Storage) -> Ancestor:
    return Ancestor(
        **_origin(source, parent).model_dump(),
        shape=parent.shape,
        operators=step.operators,
        moments=step.moments.value,
        noise=step.noise,
        options=target.growth,
        seed=step.seed,
        exact=step.exact,
        storage=storage.words,
        version=megagrow.__version__,
    )


def _made(target: TargetSpec) -> dict[str, Any]:
    """The settings that any conversion makes the weights with."""
    return {
        "model": target.shape.model_dump(mode="json"),
        "precision": target.precision,
        "parallel": target.layout.model_dump(mode="json"),
        **({} if target.load is None else {"load": target.load}),
    }


def _origin(source: Path, parent: Manifest) -> Origin:
    return Origin(
        path=str(source),
        sha256=integrity.fingerprint(source),
        family=parent.family,
        stage=parent.stage,
        iteration=parent.iteration,
    )


def describes_same(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same checkpoint.

    The megagrow version and the paths of ancestors may differ: ancestors are identified by their sha256. The history
    and what storage rounded follow from the rest, and earlier versions did not record them.
    """
    return _without_origin(one) == _without_origin(other)


def _without_origin(manifest: Manifest) -> dict[str, Any]:
    excluded: Any = {"version": True, "history": True, "lineage": {"__all__": {"path", "version", "storage"}}}
    return manifest.model_dump(exclude=excluded)
