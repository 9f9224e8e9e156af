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

    A resharded checkpoint keeps its parent's, but for what only training uses. A grown one starts a new stage at
    iteration 0, continues in the data where its parent stopped, and has the parent as its last ancestor. Where samples
    have another length, positions in the data are meaningless, and the data begins anew.
    """
    layout: dict[str, Any] = {"layout": target.layout, "precision": target.precision, "version": megagrow.__version__}
    layout |= {"shape": target.shape}
    if target.shape.seq_length != parent.shape.seq_length:
        layout |= {"position": {}, "consumed_samples": parent.consumed_tokens // target.shape.seq_length}
    if not step.operators:
        return parent.model_copy(update=layout)
    ancestor = Ancestor(
        path=str(source),
        sha256=integrity.fingerprint(source),
        family=parent.family,
        stage=parent.stage,
        iteration=parent.iteration,
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
    grown = {"stage": target.stage, "iteration": 0, "flops": 0.0}
    grown |= {"schedule": None, "threads": None}
    return parent.model_copy(update={**layout, **grown, "lineage": (*parent.lineage, ancestor)})


def describes_same(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same checkpoint.

    The megagrow version and the paths of ancestors may differ: ancestors are identified by their sha256. What storage
    rounded follows from the rest, and earlier versions did not record it.
    """
    return _without_origin(one) == _without_origin(other)


def _without_origin(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(exclude={"version": True, "lineage": {"__all__": {"path", "version", "storage"}}})
