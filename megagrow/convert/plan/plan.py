"""Plans how a checkpoint grows and is resharded: which source layer each tensor of each target layer comes from.

Pure: turns the source's index, the growth step and the target layout into an ordered tuple of tasks, one per tensor
and target layer. `make` computes any box of a task; `tiling` decides which boxes belong into which file. Masters grow
as values, the model's own weights are the masters rounded to their type, and moments follow the moment policy.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from megagrow.checkpoint.index import DType, TensorInfo
from megagrow.checkpoint.tensors import (
    OPTIMIZER_STATES,
    TensorKind,
    check_tensors,
    model_tensors,
    optimizer_key,
    source_kind,
    tensor_kinds,
)
from megagrow.config import ParallelLayout
from megagrow.convert.plan.recipe import Recipe, keeps_values, recipe_of
from megagrow.growth.maps import GrowthStep


@dataclass(frozen=True, eq=False)
class Task:
    """One tensor of one target layer.

    Attributes:
        kind: row of the tensor table.
        origin: row of the source's tensor that it grows from; None if the source has none.
        recipe: how its weights are made.
        layer, source_layer: target and source layer; None for a tensor outside the layers.
        new: whether the layer is new.
        last: whether no later task reads the same source tensor.
    """

    kind: TensorKind
    origin: TensorKind | None
    recipe: Recipe
    layer: int | None = None
    source_layer: int | None = None
    new: bool = False
    last: bool = True


@dataclass(frozen=True, eq=False)
class ConversionPlan:
    """A planned conversion.

    Attributes:
        step: the growth step with its maps.
        layout: of the target; each rank's part of a tensor consists of whole chunks.
        tasks: ordered so that the tasks of one source layer are adjacent and it is read from the disk once.
        has_optimizer: whether the source has masters, from which the weights are made.
        optimizer: whether the target gets it.
        weight_dtype: type of the target model's own weights.
        state_dtype: type of masters and moments: float32, or float64 if the source uses that.
        bytes_read: bytes that the tasks read in all.
    """

    step: GrowthStep
    layout: ParallelLayout
    tasks: tuple[Task, ...]
    has_optimizer: bool
    optimizer: bool
    weight_dtype: DType
    state_dtype: DType
    bytes_read: int

    @property
    def needs_torch(self) -> bool:
        """Whether any value must be computed. Plain copies are made without torch, whose import takes seconds."""
        return self.optimizer or any(task.recipe is not Recipe.COPY for task in self.tasks)

    def weights_key(self, origin: TensorKind) -> str:
        """The source tensor that weights are read from: the masters, if the source has Adam's state."""
        return _weights_key(origin, self.has_optimizer)


def plan_conversion(
    tensors: Mapping[str, TensorInfo],
    step: GrowthStep,
    layout: ParallelLayout,
    weight_dtype: DType,
    *,
    optimizer: bool = True,
    masters: bool = False,
) -> ConversionPlan:
    """Return the tasks of a conversion.

    Args:
        tensors: index of the source.
        step: the growth step; with equal shapes the checkpoint is only resharded.
        layout: of the target.
        weight_dtype: type of the target model's own weights.
        optimizer: also convert Adam's state, if the source has one.
        masters: without it, make the weights from the source's masters, which must be there; they are more precise.

    Raises:
        CheckpointError: the source does not hold exactly the tensors of its shape.
    """
    if optimizer:
        has_optimizer = any(key.startswith("optimizer.") for key in tensors)
        check_tensors(tensors, step.small, optimizer=has_optimizer)
    else:  # an optimizer state that is not read need not be valid
        has_optimizer = masters
        check_tensors(model_tensors(tensors), step.small, optimizer=False)
    keep = has_optimizer and optimizer
    state_dtype = _state_dtype(tensors, has_optimizer)
    made = state_dtype if keep else weight_dtype

    def is_copied(kind: TensorKind, origin: TensorKind | None) -> bool:
        same_type = origin is not None and tensors[_weights_key(origin, has_optimizer)].dtype == made
        return same_type and keeps_values(kind, step)

    tasks = _with_last(_tasks(step, is_copied))
    return ConversionPlan(
        step=step,
        layout=layout,
        tasks=tuple(tasks),
        has_optimizer=has_optimizer,
        optimizer=keep,
        weight_dtype=weight_dtype,
        state_dtype=state_dtype,
        bytes_read=sum(_bytes_read(tensors, task, has_optimizer, keep) for task in tasks if task.last),
    )


def _state_dtype(tensors: Mapping[str, TensorInfo], has_optimizer: bool) -> DType:
    """Float64 if any tensor that is read has it. The model's own weights are not read if there are masters."""
    read = (info.dtype for key, info in tensors.items() if not has_optimizer or key.startswith("optimizer."))
    return DType.FLOAT64 if DType.FLOAT64 in read else DType.FLOAT32


def _weights_key(origin: TensorKind, has_optimizer: bool) -> str:
    return optimizer_key("param", origin.key) if has_optimizer else origin.key


def _tasks(step: GrowthStep, is_copied: Callable[[TensorKind, TensorKind | None], bool]) -> Iterator[Task]:
    """The tasks in the order of the source: embeddings, each source layer with all its target layers, the rest."""
    rows = [(kind, source_kind(kind, step.small)) for kind in tensor_kinds(step.large)]
    copied = {kind.key: is_copied(kind, origin) for kind, origin in rows}

    def recipe(kind: TensorKind, origin: TensorKind | None, new: bool) -> Recipe:
        return recipe_of(kind, origin, step, is_new_layer=new, is_copied=copied[kind.key])

    outside = [Task(kind, origin, recipe(kind, origin, False)) for kind, origin in rows if not kind.per_layer]
    yield from (task for task in outside if task.kind.key.startswith("embedding."))
    targets: dict[int, list[int]] = {}
    for layer, source in enumerate(step.layers.source):
        targets.setdefault(source, []).append(layer)
    for source in sorted(targets):
        for kind, origin in rows:
            if kind.per_layer:
                for layer in targets[source]:
                    new = step.layers.new[layer]
                    yield Task(kind, origin, recipe(kind, origin, new), layer, source, new)
    yield from (task for task in outside if not task.kind.key.startswith("embedding."))


def _with_last(tasks: Iterator[Task]) -> list[Task]:
    """Clear `last` in all tasks that are followed by another task on the same source tensor."""
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
