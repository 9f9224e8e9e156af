"""Cuts a target into chunks, files and units of work.

A rank of the target layout reads its own part of each tensor and nothing else. So a chunk is such a part, and the
chunks of a rank are stored together in files of its own: weights in one, optimizer state in another. A unit is a run
of tasks, bounded in bytes, with the files of all ranks that its layers touch; its worker reads each source row once
and cuts it for all of them. None of this depends on which or how many workers there are, or on their memory.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megagrow.checkpoint.index import Box, split_evenly, volume, whole_box
from megagrow.checkpoint.tensors import OPTIMIZER_STATES, TensorKind
from megagrow.config import ModelShape, ParallelLayout
from megagrow.convert.plan.plan import ConversionPlan, Task

MIN_UNIT_BYTES = 8 << 20
MAX_UNIT_BYTES = 4 << 30
UNITS = 32
"""A target is cut into about this many units within the two bounds: enough to share, few enough to track."""


@dataclass(frozen=True, eq=False)
class TaskPart:
    """The box of a task's tensor that one unit makes."""

    task: Task
    box: Box


def unit_bytes(conversion: ConversionPlan) -> int:
    """Approximate size of a unit in bytes."""
    total = sum(_bytes(conversion, task.kind) for task in conversion.tasks)
    return min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)


def units(conversion: ConversionPlan) -> tuple[tuple[TaskPart, ...], ...]:
    """The parts of a conversion by unit. Tasks that read the same source rows stay in one unit."""
    limit, large = unit_bytes(conversion), conversion.step.large
    result: list[tuple[TaskPart, ...]] = []
    current: list[TaskPart] = []
    held = 0
    for group in _groups(conversion.tasks):
        one = whole_box(group[0].kind.layer_shape(large))
        cost = len(group) * _bytes(conversion, group[0].kind)
        if held and held + cost > limit:
            result.append(tuple(current))
            current, held = [], 0
        for box in split_evenly(one, math.ceil(cost / limit)):
            current += [TaskPart(task, box) for task in group]
            held += cost * volume(box) // max(1, volume(one))
            if held >= limit:
                result.append(tuple(current))
                current, held = [], 0
    if current:
        result.append(tuple(current))
    return tuple(result)


def chunks(kind: TensorKind, shape: ModelShape, layout: ParallelLayout, box: Box) -> Iterator[tuple[Box, int, int]]:
    """Yield (chunk, tensor rank, expert rank) for each chunk that a box is cut into, in row-major order.

    The tensor rank of an expert's chunk is one of `expert_tensor_parallel_size` ranks.
    """
    axes = [cuts(kind, shape, layout, axis, bounds) for axis, bounds in enumerate(box)]
    experts = (shape.num_moe_experts or 1) // layout.expert_model_parallel_size
    parallel = kind.tensor_parallel[0] if kind.tensor_parallel else None
    for intervals in itertools.product(*axes):
        tensor_rank = 0 if parallel is None else intervals[parallel][1]
        expert_rank = intervals[0][0][0] // experts if kind.per_expert else 0
        yield tuple(bounds for bounds, _ in intervals), tensor_rank, expert_rank


def cuts(
    kind: TensorKind, shape: ModelShape, layout: ParallelLayout, axis: int, bounds: tuple[int, int]
) -> list[tuple[tuple[int, int], int]]:
    """Cut a range of one dimension into intervals; return each with its tensor-parallel rank."""
    size, ranks = kind.layer_shape(shape)[axis], _tensor_ranks(kind, layout)
    if kind.per_expert and axis == 0:
        return [((expert, expert + 1), 0) for expert in range(*bounds)]
    if not kind.tensor_parallel or kind.tensor_parallel[0] != axis:
        return [(bounds, 0)]
    parts = ranks * kind.tensor_parallel[1]
    width = size // parts
    result = []
    for part in range(bounds[0] // width, math.ceil(bounds[1] / width)):
        start, stop = max(bounds[0], part * width), min(bounds[1], (part + 1) * width)
        result.append(((start, stop), part % ranks))
    return result


def _tensor_ranks(kind: TensorKind, layout: ParallelLayout) -> int:
    """Number of ranks that tensor parallelism cuts a tensor over."""
    return layout.expert_tensor if kind.per_expert else layout.tensor_model_parallel_size


def reading_rank(task: Task, shape: ModelShape, layout: ParallelLayout, tensor_rank: int, expert_rank: int) -> int:
    """The first global rank that reads a chunk, in Megatron's order tp-cp-ep-dp-pp.

    Experts have groups of their own, in which there is no context parallelism.
    """
    pipeline = layout.pipeline_model_parallel_size
    if task.layer is not None:
        stage = _stages(shape.num_layers, layout)[task.layer]
    else:
        stage = 0 if task.kind.key.startswith("embedding.") else pipeline - 1
    return stage * (layout.world_size // pipeline) + expert_rank * layout.expert_tensor + tensor_rank


@lru_cache(maxsize=16)
def _stages(num_layers: int, layout: ParallelLayout) -> tuple[int, ...]:
    """The pipeline rank of each layer."""
    chunks = enumerate(layout.layers_of_chunks(num_layers))
    return tuple(number % layout.pipeline_model_parallel_size for number, layers in chunks for _ in layers)


def _bytes(conversion: ConversionPlan, kind: TensorKind) -> int:
    """Bytes of one layer's tensor in all states."""
    state = 4 * len(OPTIMIZER_STATES) if conversion.optimizer else 0
    return math.prod(kind.layer_shape(conversion.step.large)) * (conversion.weight_dtype_of(kind.key).itemsize + state)


def _groups(tasks: tuple[Task, ...]) -> Iterator[list[Task]]:
    group: list[Task] = []
    for task in tasks:
        group.append(task)
        if task.last:
            yield group
            group = []
