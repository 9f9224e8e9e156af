"""Megatron's legacy checkpoints, `mp_rank_XX_YYY/model_optim_rng.pt`, read by slice.

Every rank wrote what it held, under the names of its own modules: parts of tensors, layers counted from its first.
Reading is making one index of all: each part of a tensor becomes a chunk, a view of a file, of a canonical tensor.
That index must cover every tensor exactly once, or the checkpoint is refused; nothing is loaded to find that out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.legacy.optimizer import LegacyAdam, OptimizerReader
from megagrow.checkpoint.formats.legacy.rank_files import (
    Archive,
    ModelRank,
    first_directory,
    model_file,
    ranks,
    read_state,
)
from megagrow.checkpoint.formats.legacy.rank_models import Grid, LegacyParameter, Model, read_models
from megagrow.checkpoint.formats.megatron_common import WITHOUT, is_old, layout_of_arguments, shape_of_arguments
from megagrow.checkpoint.index import Chunk, DType, OpenCheckpoint, TensorInfo, check_cover, sizes
from megagrow.checkpoint.pickles import Payload, plain
from megagrow.checkpoint.reading import ChunkReader, Files
from megagrow.checkpoint.tensors import kinds, optimizer_key
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError

_VERSION = 3.0
"""Since when rows of linear_qkv lie head by head, each head's q, k and v (2021)."""
_POSITION = ("iteration", "checkpoint_version", "opt_param_scheduler", "num_floating_point_operations_so_far")


def open_legacy(path: Path, *, shape: ModelShape | None = None, optimizer: bool = True) -> OpenCheckpoint:
    """Open a checkpoint that Megatron wrote with `--ckpt-format torch`.

    Args:
        path: its directory, `iter_XXXXXXX` or `release`.
        shape: of the model, where the checkpoint's own arguments do not say it.
        optimizer: read Adam's state too, if it is there.

    Raises:
        CheckpointError: a file is missing, damaged or would import something foreign; the model is of another kind;
            or it cannot be told which of the optimizer's values are whose (then `optimizer=False` would do).
    """
    files = Files(path)
    try:
        return _open(path, files, shape, optimizer)
    except CheckpointError:
        raise
    except Exception as error:  # a state that is whole as a pickle may still hold anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: damaged: {what[:300]}") from None
    finally:
        files.close()


def _open(path: Path, files: Files, shape: ModelShape | None, optimizer: bool) -> OpenCheckpoint:
    first = read_state(files, model_file(path, first_directory(path)))
    if not isinstance(first.state, dict):
        raise CheckpointError(f"{first.where}: holds {type(first.state).__name__}, not a model's state")
    version = first.state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _VERSION:
        raise CheckpointError(
            f"{first.where}: checkpoint_version {version}: its linear_qkv may lie in an older order, which is not "
            "read; load and save it with a Megatron-LM of 2022 or newer"
        )
    args = plain(first.state.get("args")) or {}
    where = f"{first.where}: args"
    if shape is None and not args:
        raise CheckpointError(
            f"{where}: are missing, so the model's shape is not known: give it (model.num_layers=...)"
        )
    shape = shape or shape_of_arguments(args, where)
    layout = layout_of_arguments(args, where)
    wide = {"pipeline": layout.pipeline_model_parallel_size > 1, "expert": layout.expert_model_parallel_size > 1}
    if not args:
        wide["pipeline"] = "_" in first_directory(path).removeprefix("mp_rank_")
    archives = {}
    for rank in ranks(path, **wide).values():
        name = model_file(path, rank.directory)
        archives[rank] = first if name == first.name else read_state(files, name)
    grid = _grid(path, archives, layout if args else None)
    models = read_models(archives, shape, grid)
    index = _Index(shape)
    for rank, model in models.items():
        index.add_model(archives[rank], model)
    common = {key: plain(first.state[key]) for key in _POSITION if key in first.state} | {"args": args}
    if optimizer and any("optimizer" in archive.state for archive in archives.values()):
        reader = OptimizerReader(files, args, grid, shape.tied)
        read = [reader.read(rank, archives[rank], model) for rank, model in models.items()]
        for adam in read:
            index.add_optimizer(adam)
        common["optimizer"] = _groups(path, read)
    source = ChunkReader(path, index.infos(path), {})
    source.check_extents()
    return OpenCheckpoint(_format(models, grid), source, shape, layout if args else None, common, _notes(models))


@dataclass
class _Index:
    """Chunks of canonical tensors, by key."""

    shape: ModelShape
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    forms: dict[str, tuple[tuple[int, ...], DType]] = field(default_factory=dict)

    def add_model(self, archive: Archive, model: Model) -> None:
        """Add a rank's weights."""
        for part in model:
            for parameter in part:
                self._add(parameter.kind.key, parameter, archive, archive.payload(parameter.view))

    def add_optimizer(self, adam: LegacyAdam) -> None:
        """Add a rank's optimizer."""
        for value in adam.values:
            key = optimizer_key(value.state, value.parameter.kind.key)
            self._add(key, value.parameter, value.archive, value.payload)

    def _add(self, key: str, parameter: LegacyParameter, archive: Archive, payload: Payload) -> None:
        if parameter.replica:
            return
        form = (parameter.kind.global_shape(self.shape), payload.dtype)
        if self.forms.setdefault(key, form) != form:
            raise CheckpointError(f"{archive.where}: {key} is {payload.dtype}, elsewhere {self.forms[key][1]}")
        itemsize = payload.dtype.itemsize
        for box, corner in parameter.places:
            skip = sum(at * stride for at, stride in zip(corner, payload.strides, strict=True))
            strides = (*(1 for _ in range(len(box) - len(corner))), *payload.strides)
            span = 1 + sum((n - 1) * stride for n, stride in zip(sizes(box), strides, strict=True))
            offset = payload.offset + skip * itemsize
            chunk = Chunk(box, archive.name, offset, span * itemsize, strides=strides)
            self.chunks.setdefault(key, []).append(chunk)

    def infos(self, path: Path) -> dict[str, TensorInfo]:
        """The index; CheckpointError unless every tensor of the shape is there, and all are covered exactly once."""
        wanted = [kind.key for kind in kinds(self.shape)]
        if missing := [key for key in wanted if key not in self.chunks]:
            raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
        result = {key: TensorInfo(*self.forms[key], tuple(chunks)) for key, chunks in self.chunks.items()}
        for key, info in result.items():
            check_cover(f"{path}: {key}", info)
        return result


def _grid(path: Path, archives: Mapping[ModelRank, Archive], layout: Any) -> Grid:
    """Sizes of the grid of ranks; CheckpointError unless it is the one of the layout, where that is known."""
    found = [max(each) + 1 for each in zip(*((r.tensor, r.pipeline, r.expert) for r in archives), strict=True)]
    if layout is not None:
        wanted = [
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.expert_model_parallel_size,
        ]
        if found != wanted:
            raise CheckpointError(
                f"{path}: mp_rank_* directories of {found[0]} x {found[1]} x {found[2]} tensor, pipeline and expert "
                f"ranks; its arguments say {wanted[0]} x {wanted[1]} x {wanted[2]}"
            )
    return Grid(*found)


def _groups(path: Path, read: list[LegacyAdam]) -> dict[str, Any]:
    """What is not sharded of the optimizer, as Megatron's distributed one has it: groups, at one step."""
    steps = {step for adam in read for step in adam.steps}
    if len(steps) != 1:
        raise CheckpointError(
            f"{path}: its optimizer has taken {sorted(steps) or 'no'} steps, not one number; {WITHOUT}"
        )
    step = steps.pop()
    return {"optimizer": {"param_groups": [{**group, "step": step} for group in read[0].groups]}}


def _format(models: Mapping[ModelRank, Model], grid: Grid) -> str:
    old = any(is_old(parameter.raw) for model in models.values() for part in model for parameter in part)
    ranks = grid.tensor * grid.pipeline * grid.expert
    return f"Megatron legacy torch ({'older Megatron-LM' if old else 'Megatron-Core'} names, {ranks} ranks)"


def _notes(models: Mapping[ModelRank, Model]) -> tuple[str, ...]:
    last = "output_layer.weight"
    tied = any(
        parameter.replica and parameter.kind.key != last and parameter.raw.endswith((last, "head.weight"))
        for model in models.values()
        for part in model
        for parameter in part
    )
    return ("the last pipeline stage's copy of the embedding is left out",) if tied else ()
