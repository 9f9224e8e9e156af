"""Read Megatron's legacy checkpoints (`--ckpt-format torch`) by slice.

    mp_rank_00/                   tensor-parallel rank 0
    mp_rank_00_001/               tensor-parallel rank 0, pipeline rank 1
    mp_rank_00_001_002/           the same, expert rank 2; without pipeline parallelism mp_rank_00_002/
        model_optim_rng.pt        one torch.save archive: arguments, model, plain optimizer (or model_rng.pt)
        distrib_optim.pt          the distributed optimizer's flat buffers, if it is used

Each rank saved what it held under the names of its own modules: parts of tensors, with layers numbered from its
first. Reading builds one index from all ranks, in which each part becomes a chunk of a canonical tensor. The index
must cover every tensor exactly once, or the checkpoint is refused; nothing is loaded to check that.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.legacy.optimizer import LegacyAdam, OptimizerReader
from megagrow.checkpoint.formats.legacy.rank_files import (
    ModelRank,
    RankFile,
    first_directory,
    model_file,
    ranks,
    read_state,
)
from megagrow.checkpoint.formats.legacy.rank_models import (
    LegacyParameter,
    RankGrid,
    RankModel,
    read_models,
    weight_shapes,
)
from megagrow.checkpoint.formats.megatron_common import (
    RUN_CONFIG,
    argument_notes,
    check_arguments,
    is_older_dialect,
    layout_of_arguments,
    optimizer_refusal,
    run_config_arguments,
    shape_of_arguments,
)
from megagrow.checkpoint.index import Chunk, OpenCheckpoint, TensorInfo, check_cover, sizes, tensor_of_chunks
from megagrow.checkpoint.pickles import ArchivedValues, to_plain
from megagrow.checkpoint.reading import ChunkReader, Files
from megagrow.checkpoint.tensors import ShapeNotRecordedError, optimizer_key, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

_VERSION = 3.0
"""First checkpoint_version (2021) in which linear_qkv's rows are ordered head by head: q, k and v of each head."""
_PROGRESS = ("iteration", "checkpoint_version", "opt_param_scheduler", "num_floating_point_operations_so_far")


def open_legacy(
    path: Path, *, shape: ModelShape | None = None, optimizer: bool = True, ignored_arguments: Collection[str] = ()
) -> OpenCheckpoint:
    """Open a checkpoint that Megatron wrote with `--ckpt-format torch`.

    Args:
        path: its directory, `iter_XXXXXXX` or `release`.
        shape: of the model, used if the checkpoint records no arguments.
        optimizer: whether to read Adam's state if there is one.
        ignored_arguments: saved arguments that Megatron-LM does not have and the user knows to be harmless.

    Raises:
        ShapeNotRecordedError: neither the checkpoint nor the caller gives the model's shape.
        CheckpointError: a file is missing, damaged or unsafe; the model is not supported; or the optimizer's values
            cannot be mapped to parameters (`optimizer=False` opens the checkpoint without them).
    """
    files = Files(path)
    try:
        return _open(path, files, shape, optimizer, ignored_arguments)
    except CheckpointError:
        raise
    except Exception as error:  # a state that unpickles can still contain anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: damaged: {what[:300]}") from None
    finally:
        files.close()


def _open(
    path: Path, files: Files, shape: ModelShape | None, optimizer: bool, ignored: Collection[str]
) -> OpenCheckpoint:
    first = read_state(files, model_file(path, first_directory(path)))
    if not isinstance(first.state, dict):
        raise CheckpointError(f"{first.where}: holds {type(first.state).__name__}, not a model's state")
    version = first.state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _VERSION:
        raise CheckpointError(
            f"{first.where}: checkpoint_version {version}: its linear_qkv may have an older order of rows, which is "
            "not supported; load and save it with a Megatron-LM of 2022 or newer"
        )
    args = to_plain(first.state.get("args")) or {}
    where = f"{first.where}: args"
    if not args:
        args, where = run_config_arguments(path) or {}, RUN_CONFIG
    check_arguments(args, where, ignored)
    if args:
        shape = shape_of_arguments(args, where, ignored)
    layout = layout_of_arguments(args, where)
    if layout.expert_tensor != layout.tensor_model_parallel_size:
        raise CheckpointError(
            f"{where}: expert_tensor_parallel_size {layout.expert_tensor} differs from tensor_model_parallel_size "
            f"{layout.tensor_model_parallel_size}: in the legacy format such ranks share files, which is not read; "
            "load it with Megatron-LM and save it with --ckpt-format torch_dist"
        )
    parallel = {"pipeline": layout.pipeline_model_parallel_size > 1, "expert": layout.expert_model_parallel_size > 1}
    if not args:
        parallel["pipeline"] = "_" in first_directory(path).removeprefix("mp_rank_")
    rank_files = {}
    for rank in ranks(path, **parallel).values():
        name = model_file(path, rank.directory)
        rank_files[rank] = first if name == first.name else read_state(files, name)
    grid = _grid(path, rank_files, layout if args else None)
    if shape is None:
        raise ShapeNotRecordedError(path, weight_shapes(rank_files, grid))
    models = read_models(rank_files, shape, grid)
    index = _Index(shape)
    for rank, model in models.items():
        index.add_model(rank_files[rank], model)
    common = {key: to_plain(first.state[key]) for key in _PROGRESS if key in first.state} | {"args": args}
    if optimizer and any("optimizer" in file.state for file in rank_files.values()):
        reader = OptimizerReader(files, args, grid, shape.tied)
        optimizers = [reader.read(rank, rank_files[rank], model) for rank, model in models.items()]
        for adam in optimizers:
            index.add_optimizer(adam)
        common["optimizer"] = _unsharded_optimizer(path, optimizers)
    source = ChunkReader(path, index.infos(path), {})
    source.check_extents()
    notes = (*_notes(models), *argument_notes(args))
    return OpenCheckpoint(_format(models, grid), source, shape, layout if args else None, common, notes)


@dataclass
class _Index:
    """Collects the chunks of canonical tensors from all ranks.

    Attributes:
        shape: of the model.
        chunks: by canonical key.
        shapes: global shape of each tensor, by canonical key.
    """

    shape: ModelShape
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add_model(self, file: RankFile, model: RankModel) -> None:
        """Add a rank's weights."""
        for chunk in model:
            for parameter in chunk:
                self._add(parameter.kind.key, parameter, file, file.payload(parameter.view))

    def add_optimizer(self, adam: LegacyAdam) -> None:
        """Add a rank's optimizer."""
        for value in adam.values:
            key = optimizer_key(value.state, value.parameter.kind.key)
            self._add(key, value.parameter, value.file, value.payload)

    def _add(self, key: str, parameter: LegacyParameter, file: RankFile, payload: ArchivedValues) -> None:
        if parameter.is_replica:
            return
        self.shapes[key] = parameter.kind.global_shape(self.shape)
        itemsize = payload.dtype.itemsize
        for box, corner in parameter.boxes:
            skip = sum(at * stride for at, stride in zip(corner, payload.strides, strict=True))
            strides = (*(1 for _ in range(len(box) - len(corner))), *payload.strides)
            span = 1 + sum((n - 1) * stride for n, stride in zip(sizes(box), strides, strict=True))
            offset = payload.offset + skip * itemsize
            chunk = Chunk(box, file.name, offset, span * itemsize, strides=strides, dtype=payload.dtype)
            self.chunks.setdefault(key, []).append(chunk)

    def infos(self, path: Path) -> dict[str, TensorInfo]:
        """Return the index; CheckpointError unless it has every tensor of the shape, each covered exactly once."""
        required = [kind.key for kind in tensor_kinds(self.shape)]
        if missing := [key for key in required if key not in self.chunks]:
            raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
        result = {
            key: tensor_of_chunks(f"{path}: {key}", self.shapes[key], chunks) for key, chunks in self.chunks.items()
        }
        for key, info in result.items():
            check_cover(f"{path}: {key}", info)
        return result


def _grid(path: Path, files: Mapping[ModelRank, RankFile], layout: ParallelLayout | None) -> RankGrid:
    """Return the grid of ranks; CheckpointError if it is not that of the layout, if the layout is known."""
    found = [max(each) + 1 for each in zip(*((r.tensor, r.pipeline, r.expert) for r in files), strict=True)]
    if layout is not None:
        expected = [
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.expert_model_parallel_size,
        ]
        if found != expected:
            raise CheckpointError(
                f"{path}: mp_rank_* directories of {found[0]} x {found[1]} x {found[2]} tensor, pipeline and expert "
                f"ranks; its arguments specify {expected[0]} x {expected[1]} x {expected[2]}"
            )
    return RankGrid(*found)


def _unsharded_optimizer(path: Path, optimizers: list[LegacyAdam]) -> dict[str, Any]:
    """Return the unsharded state of the optimizer as Megatron's distributed one has it: groups with one step count."""
    steps = {step for adam in optimizers for step in adam.steps}
    if len(steps) != 1:
        raise optimizer_refusal(path, f"its optimizer has taken {sorted(steps) or 'no'} steps, not one number")
    step = steps.pop()
    return {"optimizer": {"param_groups": [{**group, "step": step} for group in optimizers[0].groups]}}


def _format(models: Mapping[ModelRank, RankModel], grid: RankGrid) -> str:
    """Return the name of the format as users see it."""
    old = any(is_older_dialect(parameter.raw) for model in models.values() for chunk in model for parameter in chunk)
    ranks = grid.tensor * grid.pipeline * grid.expert
    return f"Megatron legacy torch ({'older Megatron-LM' if old else 'Megatron-Core'} names, {ranks} ranks)"


def _notes(models: Mapping[ModelRank, RankModel]) -> tuple[str, ...]:
    """Return a note if the output layer's copy of a tied embedding is left out."""
    last = "output_layer.weight"
    tied = any(
        parameter.is_replica and parameter.kind.key != last and parameter.raw.endswith((last, "head.weight"))
        for model in models.values()
        for chunk in model
        for parameter in chunk
    )
    return ("the last pipeline stage's copy of the embedding is left out",) if tied else ()
