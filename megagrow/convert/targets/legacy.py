"""Export to Megatron's legacy format: one file per model-parallel rank, weights only, streamed from any source.

The content of a rank's file follows from shape and layout: which layers, which experts, which rows or columns of each
tensor. So every file is planned to the byte, and its values are read from the source in small boxes while it is
written. Megatron-LM loads it with `--ckpt-format torch --use-checkpoint-args --no-load-optim --no-load-rng`.
"""

import itertools
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megagrow.checkpoint.formats.legacy import EMBEDDING, MODEL_FILES, ModelRank, RankGrid, rank_part
from megagrow.checkpoint.formats.megatron_common import arguments_of, module_name
from megagrow.checkpoint.index import Box, DType, Source, bytes_of, raw_of, split_by_volume
from megagrow.checkpoint.pickles import StateArchive, TensorStub, tensor_stub
from megagrow.checkpoint.tensors import TensorKind, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from megagrow.convert.plan import kept_keys
from megagrow.convert.targets.finite import FiniteCheck
from megagrow.convert.targets.protocol import OutputFile
from megagrow.errors import CheckpointError

Implementation = Literal["transformer_engine", "local"]
_CARRIED = (
    "tokenizer_type", "tokenizer_model", "vocab_file", "merge_file",
    "consumed_train_samples", "consumed_valid_samples", "seed",
)  # fmt: skip
"""Arguments of the source that remain valid for its export."""
_WITH_EXTRA_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Modules for which Megatron-Core expects an `_extra_state` next to the weights; None is accepted."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a rank: its name there, and the boxes of the canonical tensor that it concatenates."""

    name: str
    key: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, eq=False)
class _File:
    """A rank's file: its archive, and the tensor of each stub in it, by archive member."""

    name: str
    archive: StateArchive
    tensors: Mapping[str, _Tensor]


class LegacyTarget:
    """A planned legacy checkpoint of a source's weights; each model-parallel rank is one unit with one file.

    Attributes:
        notes: none.
        finite: looks at all values that are produced.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        layout: ParallelLayout,
        dtype: DType,
        common: Mapping[str, Any],
        piece_bytes: int = 16 << 20,
        *,
        implementation: Implementation = "transformer_engine",
        finite: FiniteCheck | None = None,
    ) -> None:
        """Plan all files.

        Args:
            source: holds the weights of `shape` under canonical keys.
            shape, layout: of the target; the format does not record data parallelism.
            dtype: of the target's weights, except those that stay float32 (see `kept_keys`).
            common: unsharded state of the source: `iteration`, and `args` if it has any.
            piece_bytes: most bytes to read at a time.
            implementation: Megatron-LM's `--transformer-impl`. With Transformer Engine a norm belongs to the linear
                layer that follows it and is named after that.
            finite: looks at all values that are produced.

        Raises:
            CheckpointError: the layout does not fit the shape, or the source lacks a tensor.
        """
        self.finite = finite or FiniteCheck()
        self._source, self._shape, self._layout, self._dtype = source, shape, layout, dtype
        self._common, self._implementation = common, implementation
        self._values = max(1, piece_bytes // max(dtype.itemsize, 4))
        self._check()
        self._kept = kept_keys(source.tensors, dtype)
        grid = self._grid = RankGrid(
            layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.expert_model_parallel_size
        )
        ranks = itertools.product(range(grid.tensor), range(grid.pipeline), range(grid.expert))
        self._files = [self._file(ModelRank(*rank, self._directory(*rank))) for rank in ranks]

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit."""
        return tuple((OutputFile(file.name, file.archive.size),) for file in self._files)

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (0, the file's next bytes)."""
        file = self._files[unit]
        for piece in file.archive.pieces():
            if not isinstance(piece, TensorStub):
                yield 0, piece
                continue
            tensor = file.tensors[piece.member]
            for box in tensor.boxes:
                for part in split_by_volume(box, self._values):
                    values = raw_of(self._source.read(tensor.key, part).to(self._type(tensor).torch))
                    self.finite.look(tensor.key, tuple(start for start, _ in part), values, self._type(tensor))
                    yield 0, bytes_of(values)

    def finish(self, staging: Path, common: Mapping[str, Any] | None = None) -> None:
        """Raise CheckpointError unless all files exist in full; the format has no other files."""
        for (file,) in self.units:
            path = staging / file.name
            found = path.stat().st_size if path.is_file() else 0
            if found != file.size:
                raise CheckpointError(f"{path}: {found} bytes, {file.size} were planned")

    def _check(self) -> None:
        shape, layout = self._shape, self._layout
        if layout.expert_tensor != layout.tensor_model_parallel_size:
            raise CheckpointError(
                f"{layout.describe()}: the legacy format has no place for an expert_tensor_parallel_size that differs "
                "from tensor_model_parallel_size; leave it out, or convert to torch_dist"
            )
        try:
            layout.layers_of_chunks(shape.num_layers)
        except ValueError as error:
            raise CheckpointError(f"{layout.describe()}: {error}") from None
        for name, size, ranks in (
            ("num_query_groups", shape.groups, layout.tensor_model_parallel_size),
            ("width of the MLP", shape.mlp_width, layout.tensor_model_parallel_size),
            ("padded vocabulary", shape.padded_vocab_size, layout.tensor_model_parallel_size),
            ("num_moe_experts", shape.num_moe_experts or 1, layout.expert_model_parallel_size),
        ):
            if size % ranks:
                raise CheckpointError(f"{layout.describe()}: {ranks} does not divide {name} {size}")
        for kind in tensor_kinds(shape):
            info = self._source.tensors.get(kind.key)
            if info is None or info.shape != kind.global_shape(shape):
                found = "missing" if info is None else f"of shape {list(info.shape)}"
                raise CheckpointError(f"{kind.key} is {found}, the model's is {list(kind.global_shape(shape))}")

    def _directory(self, tensor: int, pipeline: int, expert: int) -> str:
        """Name as in Megatron's `get_checkpoint_name`: kinds of parallelism that are not used have no number."""
        name = f"mp_rank_{tensor:02d}"
        name += f"_{pipeline:03d}" if self._layout.pipeline_model_parallel_size > 1 else ""
        return name + (f"_{expert:03d}" if self._layout.expert_model_parallel_size > 1 else "")

    def _file(self, rank: ModelRank) -> _File:
        iteration = self._common.get("iteration", 0)
        carried = self._common.get("args") or {}
        args = arguments_of(self._shape, self._layout, self._dtype) | {
            "transformer_impl": self._implementation,
            "ckpt_format": "torch",
            "no_save_optim": True,
            "no_save_rng": True,
            "iteration": iteration,
            **{name: carried[name] for name in _CARRIED if name in carried},
        }
        state: dict[str, Any] = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration}
        stubs: list[TensorStub] = []
        tensors: dict[str, _Tensor] = {}
        stages = self._layout.virtual_pipeline_model_parallel_size or 1
        for stage in range(stages):
            part = self._part(rank, stage)
            model: OrderedDict[str, Any] = OrderedDict()
            for tensor in part:
                stubs.append(tensor_stub(len(stubs), self._type(tensor), tensor.shape))
                tensors[stubs[-1].member] = tensor
                model[tensor.name] = stubs[-1]
            owners = dict.fromkeys(tensor.name.rpartition(".")[0] for tensor in part)
            model |= {f"{name}._extra_state": None for name in owners if name.endswith(_WITH_EXTRA_STATE)}
            state["model" if stages == 1 else f"model{stage}"] = model
        return _File(f"{rank.directory}/{MODEL_FILES[0]}", StateArchive(state, stubs), tensors)

    def _type(self, tensor: _Tensor) -> DType:
        return DType.FLOAT32 if tensor.key in self._kept else self._dtype

    def _part(self, rank: ModelRank, stage: int) -> list[_Tensor]:
        """A rank's tensors of one of its virtual pipeline stages, in the order of the model."""
        layout, shape = self._layout, self._shape
        number = stage * layout.pipeline_model_parallel_size + rank.pipeline
        is_first, is_last = number == 0, number == layout.model_chunks - 1
        before, inside, after = [], [], []
        for kind in tensor_kinds(shape):
            if kind.per_layer:
                inside.append(kind)
            elif kind.key.startswith("embedding."):
                before.append(kind)
            else:
                after.append(kind)
        tensors = [self._tensor(kind, rank) for kind in before if is_first]
        for local, layer in enumerate(layout.layers_of_chunks(shape.num_layers)[number]):
            for kind in inside:
                tensors += [self._tensor(kind, rank, layer, local, expert) for expert in self._experts(kind)]
        tensors += [self._tensor(kind, rank) for kind in after if is_last]
        if is_last and not is_first and shape.tied:
            copy = self._tensor(next(kind for kind in before if kind.key == EMBEDDING), rank)
            tensors.append(_Tensor("output_layer.weight", copy.key, copy.shape, copy.boxes))
        return tensors

    def _experts(self, kind: TensorKind) -> list[int | None]:
        """Local numbers of a rank's experts; [None] for a tensor that does not belong to experts."""
        if not kind.per_expert:
            return [None]
        return list(range((self._shape.num_moe_experts or 0) // self._layout.expert_model_parallel_size))

    def _tensor(
        self, kind: TensorKind, rank: ModelRank, layer: int = 0, local: int = 0, expert: int | None = None
    ) -> _Tensor:
        """A rank's tensor of a kind.

        Args:
            kind, rank: of the tensor.
            layer: number of its layer in the model.
            local: number of its layer in the rank.
            expert: number of its expert in the rank; None if it does not belong to one.
        """
        at = None if expert is None else rank.expert * len(self._experts(kind)) + expert
        sizes, parts = rank_part(kind, self._shape, self._grid, rank, layer if kind.per_layer else None, at)
        if len(parts) > 1 and any(any(corner[1:]) for _, corner in parts):
            raise AssertionError(f"{kind.key}: blocks of columns are not contiguous")
        name = module_name(
            kind.key,
            fused_norms=self._implementation == "transformer_engine",
            dense=self._shape.num_moe_experts is None,
            layer=local if kind.per_layer else None,
            expert=expert,
        )
        return _Tensor(name, kind.key, sizes, tuple(box for box, _ in parts))
