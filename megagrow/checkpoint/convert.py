"""Plan how a checkpoint grows and is resharded: which tensor of which target layer comes from which source layer.

Pure: from the source's index, the growth step and the target layout to an ordered tuple of tasks, one for each tensor
of each target layer. `pieces` makes any box of a task, `tiling` says which boxes belong together in which file.
Masters grow as values, the model's own weights are the masters rounded to its type, and moments go by the policy.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megagrow.checkpoint.dtypes import DType, tensor_of
from megagrow.checkpoint.names import (
    OPTIMIZER_STATES,
    TensorKind,
    extra_state_keys,
    kinds,
    optimizer_key,
    source_kind,
)
from megagrow.checkpoint.rows import PIECE_VALUES, Copier, Piece, is_copy
from megagrow.checkpoint.store import Box, Sink, Source, TensorInfo, whole
from megagrow.config import ParallelLayout
from megagrow.errors import CheckpointError
from megagrow.growth.step import GrowthStep, Moments


@dataclass(frozen=True, eq=False)
class Task:
    """One tensor of one target layer.

    Attributes:
        kind: row of the table.
        origin: row of the source's tensor that it grows from; None: it is fresh, for there is none.
        layer, source_layer: target and source layer; None for a tensor outside the layers.
        new: whether the layer is new.
        last: whether no later task reads the same source.
    """

    kind: TensorKind
    origin: TensorKind | None
    layer: int | None = None
    source_layer: int | None = None
    new: bool = False
    last: bool = True


@dataclass(frozen=True, eq=False)
class Conversion:
    """A planned conversion.

    Attributes:
        step: the maps.
        layout: of the target; chunks are cut so that each rank's part is whole chunks.
        tasks: tasks of one source layer together, so that it is read from the disk once.
        has_optimizer: whether the source has Adam's state.
        optimizer: whether the target gets it.
        weight_dtype: of the target model's own weights.
        state_dtype: of masters and moments: float32, or float64 where the source holds that.
        bytes_read: that the tasks will read, once each.
    """

    step: GrowthStep
    layout: ParallelLayout
    tasks: tuple[Task, ...]
    has_optimizer: bool
    optimizer: bool
    weight_dtype: DType
    state_dtype: DType
    bytes_read: int


def plan_conversion(
    tensors: Mapping[str, TensorInfo],
    step: GrowthStep,
    layout: ParallelLayout,
    weight_dtype: DType,
    *,
    optimizer: bool = True,
) -> Conversion:
    """Return the tasks of a conversion.

    Args:
        tensors: index of the source.
        step: the growth step; with equal shapes it only reshards.
        layout: of the target.
        weight_dtype: of the target model's own weights.
        optimizer: take Adam's state along, where there is one.

    Raises:
        CheckpointError: the source does not hold exactly the tensors of its shape.
    """
    if not optimizer and not any(key.startswith(optimizer_key("param", "")) for key in tensors):
        tensors = model_tensors(tensors)  # a state that is not read may be anything
    has_optimizer = any(key.startswith("optimizer.") for key in tensors)
    check_tensors(tensors, step.small, optimizer=has_optimizer)
    keep = has_optimizer and optimizer
    tasks = _with_last(_tasks(step))
    return Conversion(
        step=step,
        layout=layout,
        tasks=tuple(tasks),
        has_optimizer=has_optimizer,
        optimizer=keep,
        weight_dtype=weight_dtype,
        state_dtype=_state_dtype(tensors, has_optimizer),
        bytes_read=sum(_bytes_read(tensors, task, has_optimizer, keep) for task in tasks if task.last),
    )


class Maker(Protocol):
    """Makes pieces of a conversion's tasks."""

    def pieces(self, task: Task, box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, state by state, each in row-major order."""


def import_torch() -> None:
    """Import what computes values, and torch with it: early, and before memory is measured, for it takes some."""
    importlib.import_module("megagrow.checkpoint.pieces")


def maker_of(conversion: Conversion, source: Source, piece_values: int = PIECE_VALUES) -> Maker:
    """What makes a conversion's pieces: where it only copies without torch, whose import takes seconds."""
    if is_copy(conversion, source):
        return Copier(conversion, source, piece_values)
    from megagrow.checkpoint.pieces import Grower

    return Grower(conversion, source, piece_values)


def execute(conversion: Conversion, source: Source, target: Sink, piece_values: int = PIECE_VALUES) -> None:
    """Carry a whole conversion out into a sink, here and now.

    Files are written by `torch_dist_write`, which asks for the same pieces.
    """
    maker, large = maker_of(conversion, source, piece_values), conversion.step.large
    for task in conversion.tasks:
        for piece in maker.pieces(task, whole(task.kind.layer_shape(large))):
            target.put(piece.key, task.kind.global_shape(large), piece.corner, tensor_of(piece.values, piece.dtype))
    for key in extra_state_keys(large):
        target.put_object(key, [None])


def grown_common(common: Mapping[str, Any], step: GrowthStep) -> dict[str, Any]:
    """What is not sharded, for the first checkpoint of the next stage: iteration 0, and no steps after a reset."""
    if not step.operators:
        return dict(common)
    grown = {**common, "iteration": 0}
    optimizer = grown.get("optimizer")
    if step.moments is Moments.RESET and isinstance(optimizer, dict):
        grown["optimizer"] = _at_step_0(optimizer)
    return grown


def _at_step_0(optimizer: dict[Any, Any]) -> dict[Any, Any]:
    """Parameter groups as before the first step; under expert parallelism there are two optimizers, by number."""
    if "optimizer" not in optimizer:
        return {index: _at_step_0(part) for index, part in optimizer.items()}
    inner = dict(optimizer["optimizer"])
    inner["param_groups"] = [{**group, "step": 0} for group in inner["param_groups"]]
    return {**optimizer, "optimizer": inner}


def model_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """An index without the optimizer's part."""
    return {key: info for key, info in tensors.items() if not key.startswith("optimizer.")}


def check_tensors(tensors: Mapping[str, TensorInfo], shape: Any, *, optimizer: bool) -> None:
    """Raise CheckpointError unless an index holds every tensor of a shape, in its global shape, and no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for kind in kinds(shape):
        for key in (kind.key, *(optimizer_key(state, kind.key) for state in OPTIMIZER_STATES if optimizer)):
            wanted[key] = kind.global_shape(shape)
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError(f"{len(missing)} tensors are missing, first {missing[0]}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(f"{len(unknown)} tensors that this shape does not have, first {unknown[0]}")
    for key, expected in wanted.items():
        if tensors[key].shape != expected:
            raise CheckpointError(f"{key} has shape {tensors[key].shape}, the model's is {expected}")


def _state_dtype(tensors: Mapping[str, TensorInfo], has_optimizer: bool) -> DType:
    """Float64 where what is read is; the model's own weights are not, where there are masters."""
    read = (info.dtype for key, info in tensors.items() if not has_optimizer or key.startswith("optimizer."))
    return DType.FLOAT64 if DType.FLOAT64 in read else DType.FLOAT32


def _tasks(step: GrowthStep) -> Iterator[Task]:
    """The tasks in the order of the source: what lies before the layers, each layer with all its targets, the rest."""
    rows = [(kind, source_kind(kind, step.small)) for kind in kinds(step.large)]
    outside = [Task(kind, origin) for kind, origin in rows if not kind.per_layer]
    yield from (task for task in outside if task.kind.key.startswith("embedding."))
    targets: dict[int, list[int]] = {}
    for layer, source in enumerate(step.layers.source):
        targets.setdefault(source, []).append(layer)
    for source in sorted(targets):
        for kind, origin in rows:
            if kind.per_layer:
                for layer in targets[source]:
                    yield Task(kind, origin, layer, source, step.layers.new[layer])
    yield from (task for task in outside if not task.kind.key.startswith("embedding."))


def _with_last(tasks: Iterator[Task]) -> list[Task]:
    """Mark all tasks but the last of those that read the same source."""
    result: list[Task] = []
    for task in tasks:
        if result and result[-1].kind is task.kind and result[-1].source_layer == task.source_layer:
            result[-1] = replace(result[-1], last=False)
        result.append(task)
    return result


def _bytes_read(tensors: Mapping[str, TensorInfo], task: Task, has_optimizer: bool, keep: bool) -> int:
    if task.origin is None:
        return 0
    keys = [task.origin.key]
    if has_optimizer:
        keys = [optimizer_key(state, task.origin.key) for state in (OPTIMIZER_STATES if keep else ("param",))]
    parts = tensors[keys[0]].shape[0] if task.kind.per_layer else 1
    return sum(tensors[key].bytes for key in keys) // parts
