"""Grow and reshard a checkpoint in one pass over its pieces.

`plan_conversion` is pure: from the source's index, the growth step and the target layout it lists the tasks, one
for each tensor of each target layer. `execute` reads, grows, writes and drops them one by one, so what is in memory
is one tensor of one layer and its optimizer states, whatever the size of the model. Masters grow as values, the
model's own weights are the masters rounded to its type, and moments go by the policy.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint.names import OPTIMIZER_STATES, TensorKind, extra_state_keys, kinds, optimizer_key
from megagrow.checkpoint.torch_dist import Box, TensorInfo
from megagrow.config import ParallelLayout
from megagrow.errors import CheckpointError
from megagrow.growth.axes import DimMap
from megagrow.growth.layers import Inside, Silence
from megagrow.growth.step import GrowthStep, Moments
from megagrow.growth.tensors import grow_moment, grow_values, initial_values

_MOMENTS = (("exp_avg", 1), ("exp_avg_sq", 2))


class Source(Protocol):
    """A store that is read by slice."""

    tensors: dict[str, TensorInfo]

    def read(self, key: str, box: Box) -> Tensor:
        """Return the values of a box of a tensor."""


class Sink(Protocol):
    """A store that is written by chunk."""

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor) -> None:
        """Add a chunk of the tensor `key` of global `shape`, whose first entry lies at `offset`."""

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""


@dataclass(frozen=True, eq=False)
class Task:
    """One tensor of one target layer.

    Attributes:
        kind: row of the table.
        layer, source_layer: target and source layer; None for a tensor outside the layers.
        new: whether the layer is new.
    """

    kind: TensorKind
    layer: int | None = None
    source_layer: int | None = None
    new: bool = False


@dataclass(frozen=True, eq=False)
class Conversion:
    """A planned conversion.

    Attributes:
        step: the maps.
        layout: of the target; chunks are cut so that each rank's part is whole chunks.
        tasks: in the order of writing.
        optimizer: whether the source has Adam's state.
        weight_dtype: of the target model's own weights.
        bytes_read: that the tasks will read.
    """

    step: GrowthStep
    layout: ParallelLayout
    tasks: tuple[Task, ...]
    optimizer: bool
    weight_dtype: torch.dtype
    bytes_read: int


def plan_conversion(
    tensors: Mapping[str, TensorInfo], step: GrowthStep, layout: ParallelLayout, weight_dtype: torch.dtype
) -> Conversion:
    """Return the tasks of a conversion.

    Args:
        tensors: index of the source.
        step: the growth step; with equal shapes it only reshards.
        layout: of the target.
        weight_dtype: of the target model's own weights.

    Raises:
        CheckpointError: the source does not hold exactly the tensors of its shape.
    """
    optimizer = any(key.startswith("optimizer.") for key in tensors)
    check_tensors(tensors, step.small, optimizer=optimizer)
    tasks: list[Task] = []
    for kind in kinds(step.large):
        if not kind.per_layer:
            tasks.append(Task(kind))
            continue
        for layer, (source, new) in enumerate(zip(step.layers.source, step.layers.new, strict=True)):
            tasks.append(Task(kind, layer, source, new))
    per_task = [
        sum(
            info.bytes // (info.shape[0] if task.kind.per_layer else 1)
            for info in _states(tensors, task.kind, optimizer)
        )
        for task in tasks
    ]
    return Conversion(
        step=step,
        layout=layout,
        tasks=tuple(tasks),
        optimizer=optimizer,
        weight_dtype=weight_dtype,
        bytes_read=sum(per_task),
    )


def execute(
    conversion: Conversion, source: Source, target: Sink, progress: Callable[[int], None] = lambda tasks: None
) -> None:
    """Carry a conversion out; `progress` is told how many tasks are done. The caller finishes the writer."""
    maps = _MapCache(conversion.step)
    for done, task in enumerate(conversion.tasks, start=1):
        for key, values in _grow(task, conversion, source, maps.of(task.kind)):
            _write(target, key, task, conversion, values)
        progress(done)
    for key in extra_state_keys(conversion.step.large):
        target.put_object(key, [None])


def grown_common(common: Mapping[str, Any], step: GrowthStep) -> dict[str, Any]:
    """What is not sharded, for the first checkpoint of the next stage: iteration 0, and no steps after a reset."""
    if not step.operators:
        return dict(common)
    grown = {**common, "iteration": 0}
    optimizer = grown.get("optimizer")
    if step.moments is Moments.RESET and isinstance(optimizer, dict):
        inner = dict(optimizer["optimizer"])
        inner["param_groups"] = [{**group, "step": 0} for group in inner["param_groups"]]
        grown["optimizer"] = {**optimizer, "optimizer": inner}
    return grown


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


class _MapCache:
    """The dimension maps of a growth step by kind: they are the same for every layer."""

    def __init__(self, step: GrowthStep) -> None:
        self._step = step
        self._maps: dict[str, tuple[DimMap, ...]] = {}

    def of(self, kind: TensorKind) -> tuple[DimMap, ...]:
        if kind.key not in self._maps:
            self._maps[kind.key] = tuple(dim.grow(self._step) for dim in kind.dims)
        return self._maps[kind.key]


def _grow(task: Task, conversion: Conversion, source: Source, dims: tuple[DimMap, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield every grown tensor of a task with its key: weights, then masters and moments."""
    kind, step = task.kind, conversion.step
    master_key = optimizer_key("param", kind.key) if conversion.optimizer else kind.key
    values = _grow_weights(task, step, source, master_key, dims)
    yield kind.key, values.to(conversion.weight_dtype)
    if not conversion.optimizer:
        return
    yield master_key, values
    for state, power in _MOMENTS:
        key = optimizer_key(state, kind.key)
        if task.new and not _new_layer_has_moments(kind, step):
            yield key, values.new_zeros(values.shape)
        else:
            above = _read_above(source, key, task, dims)
            moment = _read(source, key, task)
            yield key, grow_moment(moment, dims, power=power, policy=step.moments, above=above)


def _silenced(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a tensor is zero in new layers, so that they pass their input on."""
    if step.layers.silence is Silence.WRITERS:
        return kind.residual_writer
    if step.layers.silence is Silence.NORMS:
        gated = step.large.swiglu
        return kind.silences_gated if gated else kind.silences
    return False


def _new_layer_has_moments(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a new layer's tensor takes over its source's moments.

    The inside of a silent layer has no gradient before it has come alive, so there `exact` means zero; so it does for
    fresh weights. Copies that are not silent have no exact gradient to predict: they take their source's.
    """
    if step.layers.inside is Inside.FRESH:
        return False
    if step.layers.silence is not Silence.NOTHING:
        return step.moments is Moments.COPY and not _silenced(kind, step)
    return step.moments in (Moments.EXACT, Moments.COPY)


def _grow_weights(task: Task, step: GrowthStep, source: Source, key: str, dims: tuple[DimMap, ...]) -> Tensor:
    kind = task.kind
    size = kind.layer_shape(step.large)
    if task.new and _silenced(kind, step):
        return torch.zeros(size, dtype=_working_dtype(source, key))
    std, name = kind.std(step.large), kind.address(task.layer)
    if task.new and step.layers.inside is Inside.FRESH:
        index = np.arange(math.prod(size), dtype=np.uint64).reshape(size)
        fresh = initial_values(index, std=std, constant=kind.constant, name=name, seed=step.seed)
        return torch.from_numpy(fresh).to(_working_dtype(source, key))
    return grow_values(
        _read(source, key, task),
        dims,
        std=std,
        constant=kind.constant,
        name=name,
        seed=step.seed,
        noise=step.noise,
        above=_read_above(source, key, task, dims),
        shrink=step.shrink,
    )


def _read_above(source: Source, key: str, task: Task, dims: tuple[DimMap, ...]) -> Tensor | None:
    """The next layer's tensor (the top layer's its own), where a map takes entries from it."""
    if task.source_layer is None or not any(dim.above.any() for dim in dims):
        return None
    above = min(task.source_layer + 1, source.tensors[key].shape[0] - 1)
    return _read(source, key, replace(task, source_layer=above))


def _read(source: Source, key: str, task: Task) -> Tensor:
    """The source of a task in one state, at least float32, without its layer dimension."""
    whole: Box = tuple((0, size) for size in source.tensors[key].shape)
    if task.source_layer is None:
        values = source.read(key, whole)
    else:
        values = source.read(key, ((task.source_layer, task.source_layer + 1), *whole[1:])).squeeze(0)
    return values.to(_working_dtype(source, key))


def _working_dtype(source: Source, key: str) -> torch.dtype:
    """Values are grown in float32, or in float64 where the source holds that."""
    return torch.float64 if source.tensors[key].dtype == torch.float64 else torch.float32


def _write(target: Sink, key: str, task: Task, conversion: Conversion, values: Tensor) -> None:
    """Write a grown tensor, cut into the parts of the target's tensor-parallel ranks."""
    shape = task.kind.global_shape(conversion.step.large)
    layer = () if task.layer is None else (task.layer,)
    ranks = conversion.layout.tensor_model_parallel_size
    dim, blocks = task.kind.tensor_parallel or (0, 1)
    parts = ranks * blocks if task.kind.tensor_parallel else 1
    start = 0
    for part in values.chunk(parts, dim):
        offset = tuple(start if axis == dim else 0 for axis in range(values.dim()))
        target.put(key, shape, (*layer, *offset), part.unsqueeze(0) if layer else part)
        start += part.shape[dim]


def _states(tensors: Mapping[str, TensorInfo], kind: TensorKind, optimizer: bool) -> Iterator[TensorInfo]:
    if not optimizer:
        yield tensors[kind.key]
        return
    for state in OPTIMIZER_STATES:
        yield tensors[optimizer_key(state, kind.key)]
