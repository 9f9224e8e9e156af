"""Plan how a checkpoint grows and is resharded: which tensor of which target layer comes from which source layer.

Pure: from the source's index, the growth step and the target layout to an ordered tuple of tasks, one for each tensor
of each target layer. `pieces` makes any box of a task, `tiling` says which boxes belong together in which file.
Masters grow as values, the model's own weights are the masters rounded to its type, and moments go by the policy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megagrow.checkpoint.index import DType, TensorInfo
from megagrow.checkpoint.tensors import (
    OPTIMIZER_STATES,
    TensorKind,
    check_tensors,
    kinds,
    model_tensors,
    optimizer_key,
    source_kind,
)
from megagrow.config import ParallelLayout
from megagrow.growth.maps import GrowthStep


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
class ConversionPlan:
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
) -> ConversionPlan:
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
    return ConversionPlan(
        step=step,
        layout=layout,
        tasks=tuple(tasks),
        has_optimizer=has_optimizer,
        optimizer=keep,
        weight_dtype=weight_dtype,
        state_dtype=_state_dtype(tensors, has_optimizer),
        bytes_read=sum(_bytes_read(tensors, task, has_optimizer, keep) for task in tasks if task.last),
    )


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
