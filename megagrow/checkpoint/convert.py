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

from megagrow.checkpoint import fused
from megagrow.checkpoint.names import (
    OPTIMIZER_STATES,
    TensorKind,
    extra_state_keys,
    kinds,
    optimizer_key,
    source_kind,
)
from megagrow.checkpoint.torch_dist import Box, TensorInfo
from megagrow.config import ParallelLayout
from megagrow.errors import CheckpointError
from megagrow.growth.axes import DimMap
from megagrow.growth.layers import Inside, Silence
from megagrow.growth.step import GrowthStep, Moments
from megagrow.growth.tensors import dense_slices, grow_moment, grow_values, initial_values, roughen

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
        origin: row of the source's tensor that it grows from; None: it is fresh, for there is none.
        layer, source_layer: target and source layer; None for a tensor outside the layers.
        new: whether the layer is new.
    """

    kind: TensorKind
    origin: TensorKind | None
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
        origin = source_kind(kind, step.small)
        if not kind.per_layer:
            tasks.append(Task(kind, origin))
            continue
        for layer, (source, new) in enumerate(zip(step.layers.source, step.layers.new, strict=True)):
            tasks.append(Task(kind, origin, layer, source, new))
    per_task = [
        sum(
            info.bytes // (info.shape[0] if task.kind.per_layer else 1)
            for info in _states(tensors, task.origin, optimizer)
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
    conversion: Conversion,
    source: Source,
    target: Sink,
    progress: Callable[[int], None] = lambda tasks: None,
    *,
    objects: bool = True,
) -> None:
    """Carry a conversion out; the caller finishes the writer.

    Args:
        conversion: the plan.
        source, target: stores.
        progress: is told how many tasks are done.
        objects: write the `_extra_state` objects too; one of several workers does.
    """
    maps = _MapCache(conversion.step)
    for done, task in enumerate(conversion.tasks, start=1):
        dims = maps.of(task.kind) if task.origin is not None else ()
        for key, values in _grow(task, conversion, source, dims):
            _write(target, key, task, conversion, values)
        progress(done)
    for key in extra_state_keys(conversion.step.large) if objects else ():
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
    kind, step, origin = task.kind, conversion.step, task.origin
    values = _grow_weights(task, conversion, source, dims)
    yield kind.key, values.to(conversion.weight_dtype)
    if not conversion.optimizer:
        return
    yield optimizer_key("param", kind.key), values
    for state, power in _MOMENTS:
        key = optimizer_key(state, kind.key)
        if origin is None or (task.new and not _new_layer_has_moments(kind, step)):
            yield key, values.new_zeros(values.shape)
        else:
            state_key = optimizer_key(state, origin.key)
            above = _read_above(source, state_key, task, step, dims)
            moment = _read(source, state_key, task, step)
            yield key, grow_moment(moment, dims, power=power, policy=step.moments, above=above)


def _silenced(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a tensor is zero in new layers, so that they pass their input on."""
    if step.layers.silence is Silence.WRITERS:
        return kind.residual_writer
    if step.layers.silence is Silence.NORMS:
        gated = step.large.swiglu or step.experts is not None
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


def _grow_weights(task: Task, conversion: Conversion, source: Source, dims: tuple[DimMap, ...]) -> Tensor:
    kind, step, origin = task.kind, conversion.step, task.origin
    size, name, std = kind.layer_shape(step.large), kind.address(task.layer), kind.std(step.large)
    if task.new and _silenced(kind, step):
        return torch.zeros(size, dtype=_working_dtype(source))
    if origin is None or (task.new and step.layers.inside is Inside.FRESH):
        return _fresh(task, step, _working_dtype(source))
    key = optimizer_key("param", origin.key) if conversion.optimizer else origin.key
    grown = grow_values(
        _read(source, key, task, step),
        dims,
        std=std,
        constant=kind.constant,
        name=name,
        seed=step.seed,
        noise=step.noise,
        above=_read_above(source, key, task, step, dims),
        shrink=step.shrink,
    )
    if kind.dims[0] is fused.ROUTER_ROWS and step.experts is not None and step.experts.noise:
        roughen(grown, step.experts.expert.new, step.experts.noise, name, step.seed)
    return grown


def _fresh(task: Task, step: GrowthStep, dtype: torch.dtype) -> Tensor:
    """Initial values. What is added to a copied layer is silent (a shared expert); experts may share router rows."""
    kind, size = task.kind, task.kind.layer_shape(step.large)
    whole_layer = task.new and step.layers.inside is Inside.FRESH
    if kind.residual_writer and not whole_layer:
        return torch.zeros(size, dtype=dtype)
    index = np.arange(math.prod(size), dtype=np.uint64).reshape(size)
    if kind.dims[0] is fused.ROUTER_ROWS and step.experts is not None and step.experts.fresh_rows is not None:
        index = index[step.experts.fresh_rows]
    std, name = kind.std(step.large), kind.address(task.layer)
    return torch.from_numpy(initial_values(index, std=std, constant=kind.constant, name=name, seed=step.seed)).to(dtype)


def _read_above(source: Source, key: str, task: Task, step: GrowthStep, dims: tuple[DimMap, ...]) -> Tensor | None:
    """The next layer's tensor (the top layer's its own), where a map takes entries from it."""
    if task.source_layer is None or not any(dim.above.any() for dim in dims):
        return None
    above = min(task.source_layer + 1, source.tensors[key].shape[0] - 1)
    return _read(source, key, replace(task, source_layer=above), step)


def _read(source: Source, key: str, task: Task, step: GrowthStep) -> Tensor:
    """The source of a task in one state, at least float32, without its layer dimension; a dense MLP as its slices."""
    whole: Box = tuple((0, size) for size in source.tensors[key].shape)
    if task.source_layer is None:
        values = source.read(key, whole)
    else:
        values = source.read(key, ((task.source_layer, task.source_layer + 1), *whole[1:])).squeeze(0)
    origin = task.origin
    if task.kind.per_expert and origin is not None and not origin.per_expert:
        assert step.experts is not None and origin.tensor_parallel is not None
        values = dense_slices(values, step.experts.expert.size, *origin.tensor_parallel)
    return values.to(_working_dtype(source))


def _working_dtype(source: Source) -> torch.dtype:
    """Values are grown in float32, or in float64 where the source holds that."""
    widest = any(info.dtype == torch.float64 for info in source.tensors.values())
    return torch.float64 if widest else torch.float32


def _write(target: Sink, key: str, task: Task, conversion: Conversion, values: Tensor) -> None:
    """Write a grown tensor, cut into the parts of the target's tensor-parallel ranks, expert by expert."""
    shape = task.kind.global_shape(conversion.step.large)
    layer = () if task.layer is None else (task.layer,)
    ranks = conversion.layout.tensor_model_parallel_size
    dim, blocks = task.kind.tensor_parallel or (0, 1)
    parts = ranks * blocks if task.kind.tensor_parallel else 1
    for expert, one in enumerate(values.chunk(len(values)) if task.kind.per_expert else (values,)):
        start = 0
        for part in one.chunk(parts, dim):
            offset = [start if axis == dim else 0 for axis in range(values.dim())]
            offset[0] += expert
            target.put(key, shape, (*layer, *offset), part.unsqueeze(0) if layer else part)
            start += part.shape[dim]


def _states(tensors: Mapping[str, TensorInfo], kind: TensorKind | None, optimizer: bool) -> Iterator[TensorInfo]:
    if kind is None:
        return
    if not optimizer:
        yield tensors[kind.key]
        return
    for state in OPTIMIZER_STATES:
        yield tensors[optimizer_key(state, kind.key)]
