"""Map the parameters of each rank of a legacy checkpoint to boxes of canonical tensors.

A rank numbers its layers from the first of its model chunk and its experts from its first, and holds its own rows or
columns of a tensor that is cut over ranks. The rank's coordinates in the grid, and the number of layers in the model
chunks before its own, give the position in the global tensor. Those layers are counted, not assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megagrow.checkpoint.formats.legacy.rank_files import ModelRank, RankFile, tensors
from megagrow.checkpoint.formats.megatron_common import EXPERTS, ModuleName, canonical_name
from megagrow.checkpoint.index import Box
from megagrow.checkpoint.pickles import PickledTensor
from megagrow.checkpoint.tensors import Shapes, TensorKind, all_tensor_kinds, tensor_kinds
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class RankGrid:
    """The grid of model-parallel ranks: the number of ranks along each axis."""

    tensor: int
    pipeline: int
    expert: int


class PlacedBox(NamedTuple):
    """A box of a global tensor, and the corner of its values in a rank's part of the tensor."""

    box: Box
    corner: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LegacyParameter:
    """A parameter of a rank.

    Attributes:
        raw: its name in the module.
        kind: the canonical tensor of which it is a part.
        view: location of its weights in the rank's file.
        boxes: of the canonical tensor that it holds.
        is_replica: whether another rank's copy is read instead.
        expert_parallel: whether it belongs to experts that are cut over ranks and have an optimizer of their own.
    """

    raw: str
    kind: TensorKind
    view: PickledTensor
    boxes: tuple[PlacedBox, ...]
    is_replica: bool
    expert_parallel: bool


RankModel = tuple[tuple[LegacyParameter, ...], ...]
"""A rank's parameters in the order of its modules, for each of its model chunks (virtual pipeline stages)."""
_NamedViews = list[tuple[str, ModuleName, PickledTensor]]
"""The tensors of a model chunk: stored name, canonical name and view."""


def read_models(files: Mapping[ModelRank, RankFile], shape: ModelShape, grid: RankGrid) -> dict[ModelRank, RankModel]:
    """Return every rank's parameters.

    Raises:
        CheckpointError: a rank holds a tensor that the shape does not have, or in another size; or the numbers of
            layers differ from the shape's.
    """
    stored = {rank: _model_chunks(file, dense=shape.num_moe_experts is None) for rank, file in files.items()}
    chunk_counts = {len(chunks) for chunks in stored.values()}
    if len(chunk_counts) != 1:
        raise CheckpointError(f"{_where(files)}: ranks differ in their number of model chunks: {sorted(chunk_counts)}")
    first_layers: dict[tuple[int, int], int] = {}
    layers = 0
    for chunk in range(chunk_counts.pop()):  # the pipeline visits all ranks once per model chunk
        for pipeline in range(grid.pipeline):
            first_layers[chunk, pipeline] = layers
            counts = {_layers(chunks[chunk], files[r]) for r, chunks in stored.items() if r.pipeline == pipeline}
            if len(counts) != 1:
                raise CheckpointError(
                    f"{_where(files)}: ranks of pipeline stage {pipeline} differ in their number of layers"
                )
            layers += counts.pop()
    if layers != shape.num_layers:
        raise CheckpointError(f"{_where(files)}: its ranks hold {layers} layers, num_layers is {shape.num_layers}")
    known = {kind.key: kind for kind in tensor_kinds(shape)}
    models: dict[ModelRank, RankModel] = {}
    for rank, chunks in stored.items():
        parameters = []
        for number, chunk_views in enumerate(chunks):
            context = _ChunkContext(shape, grid, rank, first_layers[number, rank.pipeline], known, files[rank].where)
            parameters.append(tuple(_parameter(raw, name, view, context) for raw, name, view in chunk_views))
        models[rank] = tuple(parameters)
    return models


def weight_shapes(files: Mapping[ModelRank, RankFile], grid: RankGrid) -> Shapes:
    """Return the global shapes of the weights, by canonical key, as far as names, shapes and the grid tell them."""
    raws = [raw for file in files.values() for model in _models(file) for raw, _ in tensors(model)]
    dense = not any(".experts." in raw or ".router." in raw for raw in raws)
    first = {rank: _model_chunks(file, dense=dense) for rank, file in files.items() if not rank.tensor + rank.expert}
    layers = sum(_layers(chunk, files[rank]) for rank, chunks in first.items() for chunk in chunks)
    tensor_parallel = {kind.key: kind.tensor_parallel for kind in all_tensor_kinds()}
    shapes: dict[str, tuple[int, ...]] = {}
    experts = 0
    for chunks in first.values():
        for _, name, view in (row for chunk in chunks for row in chunk):
            sizes, cut = list(view.shape), tensor_parallel.get(name.key)
            if cut is not None:
                sizes[cut[0] - (name.expert is not None)] *= grid.tensor
            experts = max(experts, 1 + name.expert if name.expert is not None else 0)
            stacked = ([layers] if name.layer is not None else []) + ([0] if name.expert is not None else [])
            shapes[name.key] = (*stacked, *sizes)
    if any("word_embeddings_for_head" in raw for raw in raws):
        shapes.pop("output_layer.weight", None)
    elif grid.pipeline > 1 and "output_layer.weight" in shapes:
        shapes["output_layer.weight"] = ()  # a weight of its own, or the last stage's copy of the embedding
    count = experts * grid.expert
    return {key: (shape[0], count, *shape[2:]) if key.startswith(EXPERTS) else shape for key, shape in shapes.items()}


@dataclass(frozen=True)
class _ChunkContext:
    """The model chunk of a rank, to which the rank's own names and numbers are relative."""

    shape: ModelShape
    grid: RankGrid
    rank: ModelRank
    first_layer: int
    known: Mapping[str, TensorKind]
    where: str


def _model_chunks(file: RankFile, *, dense: bool) -> list[_NamedViews]:
    """Return the tensors of a rank's model, for each of its model chunks."""
    chunks: list[_NamedViews] = []
    for model in _models(file):
        named = ((raw, canonical_name(raw, dense=dense), view) for raw, view in tensors(model))
        chunks.append([(raw, name, view) for raw, name, view in named if name is not None])
    return chunks


def _models(file: RankFile) -> list[dict[str, Any]]:
    """Return the state of each of a rank's model chunks."""
    state = file.state
    models = [state["model"]] if "model" in state else []
    while not models or f"model{len(models)}" in state:
        if f"model{len(models)}" not in state:
            raise CheckpointError(f"{file.where}: contains no model")
        models.append(state[f"model{len(models)}"])
    for model in models:
        if not isinstance(model, dict):
            raise CheckpointError(f"{file.where}: its model is {type(model).__name__}, not tensors by name")
    return models


def _layers(chunk: _NamedViews, file: RankFile) -> int:
    """Return the number of layers of a model chunk; CheckpointError if their numbering has gaps."""
    numbers = {name.layer for _, name, _ in chunk if name.layer is not None}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{file.where}: its layers are numbered {sorted(numbers)}, not from 0 without gaps")
    return len(numbers)


def rank_part(
    kind: TensorKind, shape: ModelShape, grid: RankGrid, rank: ModelRank, layer: int | None, expert: int | None
) -> tuple[tuple[int, ...], tuple[PlacedBox, ...]]:
    """Return the shape of a rank's part of a tensor, and the position of its blocks in the global tensor.

    Args:
        kind: row of the table of tensors.
        shape: of the model.
        grid: of all ranks.
        rank: that holds the part.
        layer, expert: in the numbering of the whole model; None if the tensor does not belong to one.
    """
    sizes = kind.layer_shape(shape)[kind.per_expert :]
    stacked = [(index, index + 1) for index in (layer, expert) if index is not None]
    dim, blocks = kind.tensor_parallel or (0, 1)
    dim -= kind.per_expert
    ranks = grid.tensor if kind.tensor_parallel else 1
    part = sizes[dim] // (blocks * ranks)
    boxes = []
    for block in range(blocks):
        start = (block * ranks + (rank.tensor if ranks > 1 else 0)) * part
        inner = [(0, size) for size in sizes]
        inner[dim] = (start, start + part)
        corner = [0] * len(sizes)
        corner[dim] = block * part
        boxes.append(PlacedBox((*stacked, *inner), tuple(corner)))
    return (*sizes[:dim], part * blocks, *sizes[dim + 1 :]), tuple(boxes)


def _parameter(raw: str, name: ModuleName, view: PickledTensor, chunk: _ChunkContext) -> LegacyParameter:
    """Return a parameter with its boxes of the canonical tensor; CheckpointError if it does not fit the shape."""
    shape, grid, rank = chunk.shape, chunk.grid, chunk.rank
    tied_copy = shape.tied and name.key == "output_layer.weight"
    kind = chunk.known.get(EMBEDDING if tied_copy else name.key)
    if kind is None or kind.per_expert != (name.expert is not None) or kind.per_layer != (name.layer is not None):
        raise CheckpointError(f"{chunk.where}: {raw}: not a tensor of the model that its arguments describe")
    layer = None if name.layer is None else chunk.first_layer + name.layer
    experts_per_rank = (shape.num_moe_experts or 0) // grid.expert
    expert = None if name.expert is None else rank.expert * experts_per_rank + name.expert
    expected, boxes = rank_part(kind, shape, grid, rank, layer, expert)
    if view.shape != expected:
        raise CheckpointError(
            f"{chunk.where}: {raw} has shape {list(view.shape)}, expected from its arguments is {list(expected)} "
            f"(with {grid.tensor} tensor-parallel ranks)"
        )
    copied_over_tensor_ranks = kind.tensor_parallel is None and rank.tensor > 0
    copied_over_expert_ranks = not kind.per_expert and rank.expert > 0
    return LegacyParameter(
        raw=raw,
        kind=kind,
        view=view,
        boxes=boxes,
        is_replica=tied_copy or copied_over_tensor_ranks or copied_over_expert_ranks,
        expert_parallel=kind.per_expert and grid.expert > 1,
    )


def _where(files: Mapping[ModelRank, RankFile]) -> str:
    """Return the checkpoint's directory."""
    first = next(iter(files.values()))
    return first.where.removesuffix("/" + first.name)
