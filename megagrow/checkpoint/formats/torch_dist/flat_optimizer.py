"""Read Megatron-Core's flat optimizers as if they had been saved fully reshardable.

A `dp_reshardable` optimizer is saved as it is in memory: for each model-parallel rank the flat buckets of its
distributed optimizer, without a record of their content (`flat_buffers`; the older `dp_zero_gather_scatter` joins a
buffer's buckets, `gathered_optimizer`). Once it is known which parameter is stored where (`flat_packing`), each
bucket becomes chunks of the canonical tensors (`optimizer.state.param.<key>` and so on), which are then read like any
other tensor.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from megagrow.checkpoint.formats.megatron_common import canonical_common, optimizer_refusal, possible_bucket_sizes
from megagrow.checkpoint.formats.torch_dist.flat_buffers import (
    BUCKET_KEY,
    OBJECT_KEY,
    optimizer_numbers,
    read_buffers,
)
from megagrow.checkpoint.formats.torch_dist.flat_packing import (
    PlacedParameter,
    dense_packings,
    expert_packings,
    find_packing,
)
from megagrow.checkpoint.formats.torch_dist.gathered_optimizer import gathered_buffers
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader, unwrapped_object
from megagrow.checkpoint.index import Chunk, DType, TensorInfo, check_cover
from megagrow.checkpoint.reading import ChunkReader
from megagrow.checkpoint.tensors import OPTIMIZER_STATES, VOCAB_READ, VOCAB_WRITE, optimizer_key, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError


class FlatOptimizerReader(ChunkReader):
    """Reads a torch_dist checkpoint with a flat optimizer: its buckets appear as the tensors that they hold."""

    def __init__(self, reader: TorchDistReader, states: Mapping[str, TensorInfo]) -> None:
        """Replace the buckets of a checkpoint by the tensors that they hold.

        Args:
            reader: the checkpoint.
            states: the optimizer's tensors by canonical key.
        """
        rest = {key: info for key, info in reader.tensors.items() if not BUCKET_KEY.match(key)}
        objects = {key: chunk for key, chunk in reader.objects.items() if not OBJECT_KEY.match(key)}
        super().__init__(reader.path, {**rest, **states}, objects, checksums=reader.checksums)
        self._reader = reader

    def common(self) -> dict[str, Any]:
        """Return the unsharded state of a fully reshardable checkpoint; parameter groups are objects in this one.

        CheckpointError if it is damaged or unsafe.
        """
        common = self._reader.common()
        optimizers: dict[int, dict[str, Any]] = defaultdict(dict)
        for key in self._reader.objects:
            match = OBJECT_KEY.match(key)
            if match and int(match[2]) == 0 and not match[3].startswith(("per_bucket_numel", "param_state")):
                optimizers[int(match[1] or 0)][match[3]] = unwrapped_object(self._reader.read_object(key))
        ordered = [optimizers[number] for number in sorted(optimizers)]
        optimizer = ordered[0] if len(ordered) == 1 else dict(enumerate(ordered))
        return canonical_common({**common, "optimizer": optimizer})


def is_dp_reshardable(reader: ChunkReader) -> bool:
    """Whether a checkpoint's optimizer was saved `dp_reshardable`."""
    return any(BUCKET_KEY.match(key) for key in reader.tensors)


def read_flat_optimizer(
    reader: TorchDistReader, shape: ModelShape, layout: ParallelLayout | None
) -> TorchDistReader | FlatOptimizerReader:
    """Return a checkpoint as if its optimizer had been saved fully reshardable; one without a flat optimizer as it is.

    Args:
        reader: the checkpoint.
        shape: of its model.
        layout: in which it was written; None: every layout with as many ranks is tried.

    Raises:
        CheckpointError: the buckets do not hold the parameters of such a model in any known order.
    """
    gathered = gathered_buffers(reader)
    flat = gathered or {key: info for key, info in reader.tensors.items() if BUCKET_KEY.match(key)}
    if not flat:
        return reader
    tensor_shapes = _tensor_shapes(reader, shape)
    bucket_sizes = possible_bucket_sizes(reader.common().get("args") or {}) if gathered else (None,)
    try:
        dense, *experts = (
            read_buffers(reader, flat, number, gathered=bool(gathered)) for number in optimizer_numbers(flat)
        )
        candidates = dense_packings(dense, shape, layout, tensor_shapes, experts_apart=bool(experts))
        placed, packing = find_packing(reader, dense, candidates, bucket_sizes, is_guessed=layout is None)
        if experts:
            candidates = expert_packings(experts[0], shape, layout, tensor_shapes, packing.order.parallel)
            placed += find_packing(reader, experts[0], candidates, bucket_sizes)[0]
        states = _states(placed, tensor_shapes)
    except CheckpointError as error:
        kind = "dp_zero_gather_scatter" if gathered else "dp_reshardable"
        raise optimizer_refusal(f"{reader.path}: its {kind} optimizer", str(error)) from None
    for key, info in states.items():
        check_cover(f"{reader.path}: {key}", info)
    return FlatOptimizerReader(reader, states)


def _tensor_shapes(reader: TorchDistReader, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the stored shapes of the model's tensors, which must be the model's except for vocabulary padding."""
    found = {}
    for kind in tensor_kinds(shape):
        if (info := reader.tensors.get(kind.key)) is None:
            raise CheckpointError(f"{reader.path}: {kind.key} is missing")
        dims = (None, *kind.dims) if kind.per_layer else kind.dims
        expected = kind.global_shape(shape)
        if len(info.shape) != len(expected) or any(
            size != wanted and dim not in (VOCAB_READ, VOCAB_WRITE)
            for size, wanted, dim in zip(info.shape, expected, dims, strict=True)
        ):
            raise CheckpointError(f"{reader.path}: {kind.key} has shape {info.shape}, the model's is {expected}")
        found[kind.key] = info.shape
    return found


def _states(placed: list[PlacedParameter], tensor_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Return the canonical tensors of the optimizer."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    dtypes: dict[str, DType] = {}
    for state, each in itertools.product(OPTIMIZER_STATES, placed):
        if each.parameter.is_read:
            key = optimizer_key(state, each.parameter.key)
            chunks[key] += each.chunks(state)
            dtypes[key] = each.stored(state).dtype
    shapes = {optimizer_key(state, key): shape for key, shape in tensor_shapes.items() for state in OPTIMIZER_STATES}
    return {key: TensorInfo(shape, dtypes.get(key, DType.FLOAT32), tuple(chunks[key])) for key, shape in shapes.items()}
