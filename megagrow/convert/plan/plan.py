"""Plans how a checkpoint grows and is resharded: which source layer each tensor of each target layer comes from.

Pure: turns the source's index, the growth step and the target layout into an ordered tuple of tasks, one per tensor
and target layer. `make` computes any box of a task; `tiling` decides which boxes belong into which file. Masters grow
as values, the model's own weights are the masters rounded to their type, and moments follow the moment policy.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megagrow.checkpoint.index import DType, TensorInfo, common_dtype
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
from megagrow.convert.plan.storage import Scaling, Storage, StoredTensor, describe_storage, scaling_of
from megagrow.growth.maps import GrowthStep

_NAMED = 3
"""How many tensors a note names."""


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
        weight_dtype: type of the target model's own weights, except those in `kept`.
        kept: keys of weights that stay float32, because the source has them so in a model of `weight_dtype`.
        state_dtype: type of masters and moments: float32, or float64 if the source uses that.
        bytes_read: bytes that the tasks read in all.
        storage: what storing does to the weights that come from the source.
    """

    step: GrowthStep
    layout: ParallelLayout
    tasks: tuple[Task, ...]
    has_optimizer: bool
    optimizer: bool
    weight_dtype: DType
    state_dtype: DType
    bytes_read: int
    storage: Storage
    kept: frozenset[str] = frozenset()

    @property
    def needs_torch(self) -> bool:
        """Whether any value must be computed. Plain copies are made without torch, whose import takes seconds."""
        return self.optimizer or any(task.recipe is not Recipe.COPY for task in self.tasks)

    def weight_dtype_of(self, key: str) -> DType:
        """The type of one of the target model's own weights."""
        return DType.FLOAT32 if key in self.kept else self.weight_dtype

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
    wide = kept_keys(tensors, weight_dtype)
    kept = {
        kind.key
        for kind in tensor_kinds(step.large)
        if (origin := source_kind(kind, step.small)) is not None and origin.key in wide
    }

    def is_copied(kind: TensorKind, origin: TensorKind | None) -> bool:
        made = state_dtype if keep else DType.FLOAT32 if kind.key in kept else weight_dtype
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
        kept=frozenset(kept),
        storage=describe_storage(_stored(tensors, tasks, step, weight_dtype, has_optimizer, kept), len(tasks)),
    )


def _stored(
    tensors: Mapping[str, TensorInfo],
    tasks: Sequence[Task],
    step: GrowthStep,
    made: DType,
    has_optimizer: bool,
    kept: Collection[str],
) -> Iterator[StoredTensor]:
    """The tensors that are made from the source's values; new and zero ones are stored as they are meant."""
    scales: dict[str, Scaling] = {}
    for task in tasks:
        if task.origin is None or task.recipe not in (Recipe.COPY, Recipe.GROW):
            continue
        if task.kind.key not in scales:
            scales[task.kind.key] = scaling_of(task.kind, step)
        own = tensors[task.origin.key].dtype
        read = tensors[_weights_key(task.origin, has_optimizer)].dtype
        stored = DType.FLOAT32 if task.kind.key in kept else made
        yield StoredTensor(own, read, stored, scales[task.kind.key])


def kept_keys(tensors: Mapping[str, TensorInfo], dtype: DType) -> frozenset[str]:
    """Return the keys of weights that stay float32 in a target of a narrower type.

    They are the float32 tensors of a source whose other weights have that very type: norms, routers or output layers
    that its trainer kept wider. Rounding them would change the function. In a target of any other type all weights
    are cast, as the user asked.
    """
    weights = {key: info.dtype for key, info in model_tensors(tensors).items()}
    if dtype not in (DType.BFLOAT16, DType.FLOAT16) or dtype not in weights.values():
        return frozenset()
    return frozenset(key for key, found in weights.items() if found is DType.FLOAT32)


def type_notes(tensors: Mapping[str, TensorInfo], dtype: DType) -> tuple[str, ...]:
    """Return notes that count and name the weights of a source that stay wider than a target's type, or are rounded."""
    weights = {key: info.dtype for key, info in model_tensors(tensors).items()}
    kept, notes = kept_keys(tensors, dtype), []
    if kept:
        notes.append(
            f"{len(kept)} of {len(weights)} tensors stay float32, as in the source: {_named(kept)}; Megatron-Core "
            f"rounds them on load where its model is {dtype}"
        )
    for found in sorted({found for key, found in weights.items() if key not in kept}, key=str):
        if common_dtype({found, dtype}) is not dtype:
            rounded = [key for key, each in weights.items() if each is found and key not in kept]
            count = "all" if len(rounded) == len(weights) else f"{len(rounded)} of {len(weights)}"
            notes.append(f"{count} tensors are rounded from {found} to {dtype}: {_named(rounded)}")
    return tuple(notes)


def _named(keys: Collection[str]) -> str:
    first = ", ".join(sorted(keys)[:_NAMED])
    return first if len(keys) <= _NAMED else f"{first} and {len(keys) - _NAMED} more"


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
