"""Find out which parameter is stored where in an optimizer's flat buffers, and prove it.

The packing follows from how the model was cut and from the order of its parameters, and neither is recorded in full.
So every candidate is tried and nothing is guessed: the parameters must fill the buckets to the value, and the fp32
masters, rounded, must equal the model's own weights at the start of every parameter. A candidate that passes both
checks is the packing that was written.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megagrow.checkpoint.formats.megatron_common import BufferRange, boxes_of_range, bucket_layout
from megagrow.checkpoint.formats.torch_dist.flat_buffers import FlatBuffer, FlatBuffers, ranks_and_chunks
from megagrow.checkpoint.formats.torch_dist.parameter_order import (
    ExpertOrder,
    LayerOrder,
    ParallelSizes,
    ParameterOrder,
    RankParameter,
)
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index import Chunk, TensorInfo, intersect, row_major, slice_text
from megagrow.checkpoint.reading import ChunkReader
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

_EXPERT_PREFIX = "decoder.layers.mlp.experts."
_COMPARED = 64
"""Values at the start of each parameter that are compared with the model's."""


class _Unproven(CheckpointError):
    """A candidate fits the buckets, but after the first `agreed` parameters the values are not the model's."""

    def __init__(self, agreed: int, message: str) -> None:
        super().__init__(message)
        self.agreed = agreed


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter and the range of a flat buffer that stores it."""

    parameter: RankParameter
    range: BufferRange
    buffer: FlatBuffer

    def stored(self, state: str) -> TensorInfo:
        """Return the bucket that stores one of Adam's states of the parameter."""
        return self.buffer.buckets[self.range.bucket][state]

    def chunks(self, state: str) -> Iterator[Chunk]:
        """Yield the parameter's chunks of the canonical tensor, for one of Adam's states."""
        parameter, inside = self.parameter, self.range
        stored = self.stored(state).chunks
        own_strides = row_major(parameter.shape)
        first = bisect.bisect_right(stored, inside.start, key=lambda chunk: chunk.box[0][0]) - 1
        for chunk in itertools.takewhile(lambda chunk: chunk.box[0][0] < inside.stop, stored[max(first, 0) :]):
            start, stop = chunk.box[0]
            begin, end = max(start, inside.start), min(stop, inside.stop)
            for box, skip in boxes_of_range(parameter.shape, begin - inside.start, end - inside.start):
                for piece in parameter.boxes:
                    if (part := intersect(box, piece.box)) is None:
                        continue
                    offsets = (a - b for (a, _), (b, _) in zip(part, box, strict=True))
                    skip_in_box = sum(n * stride for n, stride in zip(offsets, own_strides, strict=True))
                    yield replace(
                        chunk,
                        box=piece.in_tensor(part),
                        start=chunk.start + begin - start + skip + skip_in_box,
                        strides=piece.strides_in_tensor(own_strides),
                    )


@dataclass(frozen=True)
class Packing:
    """A candidate for how an optimizer's parameters are packed.

    Attributes:
        order: the parameters of each rank, in order.
        experts: True if the optimizer has experts' parameters only, False if it has none of them, None if it has all.
        bucket_size: size at which buckets were closed that are gathered now, on the first pipeline stage; None: never.
    """

    order: ParameterOrder
    experts: bool | None
    bucket_size: int | None = None

    def placed(self, group: int, chunk: int, buffer: FlatBuffer) -> list[PlacedParameter]:
        """Return the parameters of a buffer with their ranges; CheckpointError unless they fill it to the value."""
        parallel = self.order.parallel
        rank = parallel.expert_rank(group, chunk) if self.experts else parallel.rank(group, chunk)
        parameters = [
            each
            for each in self.order.parameters_of(rank)
            if self.experts in (None, each.key.startswith(_EXPERT_PREFIX))
        ]
        sizes = [math.prod(each.shape) for each in parameters]
        own_bucket = [number for number, each in enumerate(parameters) if each.is_shared_embedding]
        if buffer.gathered:
            size = None if rank.pipeline or rank.chunk else self.bucket_size
            layout = bucket_layout(sizes, own_bucket=own_bucket, bucket_size=size).joined()
            if list(layout.sizes) != buffer.bucket_sizes:
                raise CheckpointError(f"its parameters fill {layout.sizes[0]} values, not {buffer.bucket_sizes[0]}")
        else:
            layout = bucket_layout(sizes, own_bucket=own_bucket, known_sizes=buffer.bucket_sizes)
        return [PlacedParameter(each, inside, buffer) for each, inside in zip(parameters, layout.ranges, strict=True)]


def dense_packings(
    buffers: FlatBuffers,
    shape: ModelShape,
    layout: ParallelLayout | None,
    tensor_shapes: Mapping[str, tuple[int, ...]],
    *,
    experts_apart: bool,
) -> Iterator[Packing]:
    """Yield the candidates for the optimizer of the dense parameters, which may include the experts' parameters.

    Args:
        buffers: of that optimizer.
        shape: of the model.
        layout: in which it was written; None: every layout with as many ranks is a candidate.
        tensor_shapes: global shape of each tensor.
        experts_apart: whether experts have an optimizer of their own.
    """
    ranks, chunks = ranks_and_chunks(buffers)
    splits = [
        ParallelSizes(tensor, ranks // tensor, chunks, 1, tensor)
        for tensor in range(1, ranks + 1)
        if ranks % tensor == 0
    ]
    if layout is not None:
        tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        expected = ParallelSizes(tensor, pipeline, layout.virtual_pipeline_model_parallel_size or 1, 1, tensor)
        splits = [replace(split, layers=_layers(shape, layout)) for split in splits if split == expected]
        if not splits:
            raise CheckpointError(
                f"written by {ranks} model-parallel ranks with {chunks} model chunks, not by {layout.describe()}"
            )
    mixed = shape.num_moe_experts is not None and not experts_apart
    expert_orders = list(ExpertOrder) if mixed else list(ExpertOrder)[:1]
    for split, layer_order, expert_order in itertools.product(splits, LayerOrder, expert_orders):
        order = ParameterOrder(shape, tensor_shapes, split, layer_order, expert_order)
        if order.is_possible():
            yield Packing(order, False if experts_apart else None)


def _layers(shape: ModelShape, layout: ParallelLayout) -> tuple[int, ...] | None:
    """Number of layers of each model chunk; None if all have as many."""
    if not layout.uneven:
        return None
    try:
        return tuple(map(len, layout.layers_of_chunks(shape.num_layers)))
    except ValueError as error:
        raise CheckpointError(f"its arguments do not divide the layers: {error}") from None


def expert_packings(
    buffers: FlatBuffers,
    shape: ModelShape,
    layout: ParallelLayout | None,
    tensor_shapes: Mapping[str, tuple[int, ...]],
    dense: ParallelSizes,
) -> Iterator[Packing]:
    """Yield the candidates for an optimizer of experts' parameters only, given the sizes found for the dense ones."""
    ranks, chunks = ranks_and_chunks(buffers)
    if ranks % dense.pipeline or chunks != dense.virtual:
        raise CheckpointError(f"{ranks} ranks with {chunks} chunks hold experts of a model that is cut as {dense}")
    per_stage = ranks // dense.pipeline
    for experts in [layout.expert_model_parallel_size] if layout else range(1, per_stage + 1):
        split = replace(dense, experts=experts, expert_tensor=per_stage // experts)
        for expert_order in ExpertOrder if per_stage % experts == 0 else ():
            order = ParameterOrder(shape, tensor_shapes, split, LayerOrder.LOCAL, expert_order)
            if order.is_possible():
                yield Packing(order, True)


def find_packing(
    reader: TorchDistReader,
    buffers: FlatBuffers,
    candidates: Iterable[Packing],
    bucket_sizes: Sequence[int | None],
    *,
    is_guessed: bool = False,
) -> tuple[list[PlacedParameter], Packing]:
    """Return the candidate that was written, with the place of every parameter.

    Args:
        reader: the checkpoint.
        buffers: of the optimizer.
        candidates: to try, in order.
        bucket_sizes: sizes at which buckets may have been closed that are gathered now.
        is_guessed: whether the candidates are all even layouts, because the checkpoint does not record its own.

    Raises:
        CheckpointError: no candidate fills the buckets and has the model's values.
    """
    unproven: list[_Unproven] = []
    refused: list[CheckpointError] = []
    for packing in (replace(each, bucket_size=size) for each in candidates for size in bucket_sizes):
        try:
            placed = [each for place, buffer in sorted(buffers.items()) for each in packing.placed(*place, buffer)]
            _prove(reader, placed)
            return placed, packing
        except _Unproven as error:
            unproven.append(error)
        except CheckpointError as error:
            refused.append(error)
    if unproven:
        raise max(unproven, key=lambda error: error.agreed)
    reason = str(refused[0]) if refused else "the model cannot be cut over so many ranks"
    if is_guessed:
        reason += "; the checkpoint does not record its layout, and only even pipelines were tried"
    raise CheckpointError(f"its buckets do not hold this model's parameters: {reason}")


def _prove(reader: TorchDistReader, placed: list[PlacedParameter]) -> None:
    """Raise _Unproven unless the first masters of each parameter, rounded, are the model's own weights."""
    import torch

    masters = ChunkReader(reader.path, {}, {}, checksums=reader.checksums)
    for agreed, each in enumerate(placed):
        parameter = each.parameter
        info = reader.tensors[parameter.key]
        masters.tensors = {
            parameter.key: TensorInfo(info.shape, each.stored("param").dtype, tuple(each.chunks("param")))
        }
        for box, _ in boxes_of_range(parameter.shape, 0, min(_COMPARED, math.prod(parameter.shape))):
            for piece in parameter.boxes:
                if (part := intersect(box, piece.box)) is None:
                    continue
                where = piece.in_tensor(part)
                rounded = masters.read(parameter.key, where).to(info.dtype.torch)
                if not torch.equal(rounded, reader.read(parameter.key, where)):
                    raise _Unproven(
                        agreed,
                        "its masters differ from the model's weights in every known order of parameters, first in "
                        f"{parameter.key} {slice_text(where)}",
                    )
