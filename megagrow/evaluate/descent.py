"""Opens the two checkpoints that `verify --deep` compares, of any format, and finds the growth step between them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import MANIFEST, Manifest, integrity, read_manifest
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.tensors import GROWTH_RECORD, NEW_PARAMETERS, read_growth_record
from megagrow.config import ModelShape, Schedule, check_same_model
from megagrow.errors import CheckpointError
from megagrow.evaluate.live import TensorSource


@dataclass(frozen=True)
class ComparedCheckpoint:
    """One of the two opened checkpoints.

    Attributes:
        path: its directory.
        shape: shape of its model.
        source: its tensors.
        steps: number of Adam steps behind its moments.
        schedule, learning_rate: settings for its training steps.
        manifest: its manifest; None if megagrow did not write it.
    """

    path: Path
    shape: ModelShape
    source: TensorSource
    steps: int = 0
    schedule: Schedule = Schedule()
    learning_rate: float = 1e-3
    manifest: Manifest | None = None


def open_compared(path: Path, trained: Manifest | None = None) -> ComparedCheckpoint:
    """Open a checkpoint of any format.

    Args:
        path: its directory.
        trained: manifest that the schedule comes from, because a grown child has none yet; None: its own.

    Raises:
        CheckpointError: it is damaged, or nothing in it tells the shape of its model.
    """
    manifest = None
    if (path / MANIFEST).is_file():
        integrity.check(path)
        manifest = read_manifest(path)
    opened = open_checkpoint(path)
    shape = opened.shape if manifest is None else manifest.shape
    if shape is None:
        raise CheckpointError(f"{path}: nothing in it tells the shape of its model; convert it first, with source.*")
    of = trained or manifest
    settings = (of.schedule if of else None) or {}
    fields = {name: settings[name] for name in Schedule.model_fields if name in settings and name != "max_lr"}
    optimizer = opened.common.get("optimizer")
    if isinstance(optimizer, dict) and "optimizer" not in optimizer:
        optimizer = next(iter(optimizer.values()), None)  # with expert parallelism there are two, at the same step
    inner = optimizer.get("optimizer") if isinstance(optimizer, dict) else None
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    return ComparedCheckpoint(
        path=path,
        shape=shape,
        source=opened.source,
        steps=int(groups[0].get("step", 0)) if groups else 0,
        schedule=Schedule.model_validate(fields),
        learning_rate=float(settings.get("max_lr", 1e-3)),
        manifest=manifest,
    )


def growth_between(parent: ComparedCheckpoint, child: ComparedCheckpoint) -> dict[str, Any] | None:
    """Return the child's growth record; None where the child is the parent in another layout or format.

    Raises:
        CheckpointError: the child neither was grown from the parent nor is the parent, or has been trained since.
    """
    if child.manifest is None:
        return _of_foreign(parent, child)
    lineage = child.manifest.lineage
    if lineage and _is_ancestor(parent, lineage[-1].sha256, lineage[-1].shape):
        trained = child.manifest.history is None or child.manifest.history.tokens
        if child.manifest.iteration and trained:  # a conversion that keeps its place has an iteration, too
            raise CheckpointError(
                f"{child.path}: has trained {child.manifest.iteration} steps since it was grown; --deep compares what "
                "the conversion wrote (iter_0000000): to write it again, run "
                "`megagrow convert FAMILY --stage STAGE --save DIR`"
            )
        content = read_growth_record(child.path)
        if content is None:
            raise CheckpointError(f"{child.path}: was grown, but its growth record ({GROWTH_RECORD}) is missing")
        return content
    same = ("family", "stage", "iteration", "shape", "lineage")
    if parent.manifest is not None:
        if all(getattr(child.manifest, name) == getattr(parent.manifest, name) for name in same):
            return None
    elif not lineage and _is_same_model(parent.shape, child.shape):
        return None
    origin = f"grown from {lineage[-1].path}" if lineage else "not grown"
    raise CheckpointError(f"{child.path}: was {origin}, not from {parent.path}")


def _is_ancestor(parent: ComparedCheckpoint, sha256: str, shape: ModelShape) -> bool:
    """Whether a recorded ancestor is a checkpoint. One without checksums is known by its model alone."""
    found = integrity.fingerprint(parent.path)
    if found or parent.manifest is not None:
        return found == sha256
    return sha256 == "" and _is_same_model(parent.shape, shape)


def _of_foreign(parent: ComparedCheckpoint, child: ComparedCheckpoint) -> dict[str, Any] | None:
    """The growth record of an export; such a directory names no checksum of its parent, so the model must agree."""
    if (child.path / NEW_PARAMETERS).is_file():
        content = read_growth_record(child.path)
        try:
            small = ModelShape.model_validate((content or {}).get("source_shape"))
        except ValueError:
            raise CheckpointError(f"{child.path / GROWTH_RECORD}: missing or damaged") from None
        if content is not None and _is_same_model(parent.shape, small):
            return _without_padding(content, child.shape.padded_vocab_size)
    if not _is_same_model(parent.shape, child.shape):
        raise CheckpointError(
            f"{child.path}: neither the model of {parent.path} nor, as far as its files tell, grown from one like it"
        )
    return None


def _is_same_model(one: ModelShape, other: ModelShape) -> bool:
    try:
        check_same_model(one, other, ("one", "the other"))
    except ValueError:
        return False
    return True


def _without_padding(content: dict[str, Any], rows: int) -> dict[str, Any]:
    """A growth record without the rows of padding, which an export does not have."""
    found: dict[str, Any] = json.loads(json.dumps(content))
    vocab = found["axes"]["vocab"]
    vocab["runs"] = [{**run, "stop": min(run["stop"], rows)} for run in vocab["runs"] if run["start"] < rows]
    vocab["to"] = min(vocab["to"], rows)
    return found
