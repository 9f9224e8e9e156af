"""What the ranks of a legacy checkpoint hold of the model: each parameter, in order, as boxes of canonical tensors.

A rank knows its layers as the first, second, ... of its part of the pipeline, its experts as its first, second, ...,
and of a tensor that is cut over ranks its own rows or columns. All that turns these into places in the global tensor
is the rank's place in the grid and the number of layers in the parts before its own, which are counted, not assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megagrow.checkpoint.formats.legacy.rank_files import Archive, ModelRank, tensors
from megagrow.checkpoint.formats.megatron_common import ModuleName, canonical_name
from megagrow.checkpoint.index import Box
from megagrow.checkpoint.pickles import View
from megagrow.checkpoint.tensors import TensorKind, kinds
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError

EMBEDDING = "embedding.word_embeddings.weight"
Places = tuple[tuple[Box, tuple[int, ...]], ...]
"""Boxes of a global tensor, each with the corner in a rank's part where its first entry lies."""


@dataclass(frozen=True)
class Grid:
    """Sizes of the grid of model-parallel ranks."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True, eq=False)
class LegacyParameter:
    """A parameter of a rank.

    Attributes:
        raw: its name in the module.
        kind: the canonical tensor that it is a part of.
        view: where its weights lie in the rank's file.
        places: of it in the canonical tensor.
        replica: whether another rank's copy counts instead.
        expert_parallel: whether it is one of experts that are cut over ranks, which have an optimizer to themselves.
    """

    raw: str
    kind: TensorKind
    view: View
    places: Places
    replica: bool
    expert_parallel: bool


Model = tuple[tuple[LegacyParameter, ...], ...]
"""A rank's parameters in the order of its modules, for each of its parts of the pipeline (virtual stages)."""
_PipelinePart = list[tuple[str, ModuleName, View]]


def read_models(archives: Mapping[ModelRank, Archive], shape: ModelShape, grid: Grid) -> dict[ModelRank, Model]:
    """Return every rank's parameters.

    Raises:
        CheckpointError: a rank holds a tensor that the shape does not have, or of another size; or its layers are not
            those of the shape.
    """
    raw = {rank: _parts(archive, dense=shape.num_moe_experts is None) for rank, archive in archives.items()}
    virtual = {len(parts) for parts in raw.values()}
    if len(virtual) != 1:
        raise CheckpointError(f"{_where(archives)}: ranks have {sorted(virtual)} parts of the pipeline each")
    first: dict[tuple[int, int], int] = {}
    layers = 0
    for stage in range(virtual.pop()):  # the pipeline goes through all ranks once for each virtual stage
        for pipeline in range(grid.pipeline):
            first[stage, pipeline] = layers
            counts = {_layers(parts[stage], archives[r]) for r, parts in raw.items() if r.pipeline == pipeline}
            if len(counts) != 1:
                raise CheckpointError(f"{_where(archives)}: ranks of pipeline stage {pipeline} differ in their layers")
            layers += counts.pop()
    if layers != shape.num_layers:
        raise CheckpointError(f"{_where(archives)}: its ranks hold {layers} layers, num_layers is {shape.num_layers}")
    known = {kind.key: kind for kind in kinds(shape)}
    return {
        rank: tuple(
            tuple(
                _parameter(raw_name, name, view, _Local(shape, grid, rank, first[stage, rank.pipeline], known), archive)
                for raw_name, name, view in part
            )
            for stage, part in enumerate(raw[rank])
        )
        for rank, archive in archives.items()
    }


@dataclass(frozen=True)
class _Local:
    """What a rank's names are relative to."""

    shape: ModelShape
    grid: Grid
    rank: ModelRank
    first_layer: int
    known: Mapping[str, TensorKind]


def _parts(archive: Archive, *, dense: bool) -> list[_PipelinePart]:
    """Tensors of a rank's model, for each of its parts of the pipeline."""
    state = archive.state
    models = [state["model"]] if "model" in state else []
    while not models or f"model{len(models)}" in state:
        if f"model{len(models)}" not in state:
            raise CheckpointError(f"{archive.where}: holds no model")
        models.append(state[f"model{len(models)}"])
    parts: list[_PipelinePart] = []
    for model in models:
        if not isinstance(model, dict):
            raise CheckpointError(f"{archive.where}: its model is {type(model).__name__}, not tensors by name")
        named = ((raw, canonical_name(raw, dense=dense), view) for raw, view in tensors(model))
        parts.append([(raw, name, view) for raw, name, view in named if name is not None])
    return parts


def _layers(part: _PipelinePart, archive: Archive) -> int:
    """Layers of a part; CheckpointError where their numbers have gaps."""
    numbers = {name.layer for _, name, _ in part if name.layer is not None}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{archive.where}: its layers are {sorted(numbers)}, which are not counted from 0")
    return len(numbers)


def local_part(
    kind: TensorKind, shape: ModelShape, grid: Grid, rank: ModelRank, layer: int | None, expert: int | None
) -> tuple[tuple[int, ...], Places]:
    """Return the shape of a rank's part of a tensor, and where its blocks lie in the global tensor.

    Args:
        kind: row of the table.
        shape, grid, rank: of the model, of all ranks, and the rank.
        layer, expert: in the whole model; None where the tensor is not one of several.
    """
    sizes = kind.layer_shape(shape)[kind.per_expert :]
    front = [(at, at + 1) for at in (layer, expert) if at is not None]
    dim, blocks = kind.tensor_parallel or (0, 1)
    dim -= kind.per_expert
    ranks = grid.tensor if kind.tensor_parallel else 1
    part = sizes[dim] // (blocks * ranks)
    places = []
    for block in range(blocks):
        start = (block * ranks + (rank.tensor if ranks > 1 else 0)) * part
        inner = [(0, size) for size in sizes]
        inner[dim] = (start, start + part)
        corner = [0] * len(sizes)
        corner[dim] = block * part
        places.append(((*front, *inner), tuple(corner)))
    return (*sizes[:dim], part * blocks, *sizes[dim + 1 :]), tuple(places)


def _parameter(raw: str, name: ModuleName, view: View, local: _Local, archive: Archive) -> LegacyParameter:
    shape, grid, rank = local.shape, local.grid, local.rank
    tied_copy = shape.tied and name.key == "output_layer.weight"
    kind = local.known.get(EMBEDDING if tied_copy else name.key)
    if kind is None or kind.per_expert != (name.expert is not None) or kind.per_layer != (name.layer is not None):
        raise CheckpointError(f"{archive.where}: {raw}: a tensor that a model of its arguments does not have")
    layer = None if name.layer is None else local.first_layer + name.layer
    each = (shape.num_moe_experts or 0) // grid.expert
    expert = None if name.expert is None else rank.expert * each + name.expert
    wanted, places = local_part(kind, shape, grid, rank, layer, expert)
    if view.shape != wanted:
        raise CheckpointError(
            f"{archive.where}: {raw} has shape {list(view.shape)}, by its arguments it is {list(wanted)} "
            f"(with {grid.tensor} tensor-parallel ranks)"
        )
    other_tensor = kind.tensor_parallel is None and rank.tensor > 0
    other_expert = not kind.per_expert and rank.expert > 0
    return LegacyParameter(
        raw=raw,
        kind=kind,
        view=view,
        places=places,
        replica=tied_copy or other_tensor or other_expert,
        expert_parallel=kind.per_expert and grid.expert > 1,
    )


def _where(archives: Mapping[ModelRank, Archive]) -> str:
    """The checkpoint's directory."""
    some = next(iter(archives.values()))
    return some.where.removesuffix("/" + some.name)
