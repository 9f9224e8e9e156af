"""Megatron-Core's `dp_reshardable` optimizer, read as if it had been saved fully reshardable.

There the optimizer is saved as it lies in memory: for each model-parallel rank the flat buckets of its distributed
optimizer, without a word of what is in them (an older layout joins a buffer's buckets: `gathered`). Here each bucket
is taken apart into chunks of the canonical tensors (`optimizer.state.param.<key>` and so on), so that to whoever
reads them they are tensors like any other.

What lies in a bucket follows from how the model was cut and from the order of its parameters. Nothing is guessed:
the parameters must fill the buckets to the value, and the fp32 masters in them, rounded, must be the model's own
weights, wherever a parameter begins. Whatever order passes both is the one that was written.
"""

import bisect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megagrow.checkpoint.formats.megatron_common import (
    BufferRange,
    boxes_of_range,
    bucket_layout,
    bucket_sizes,
    canonical_common,
    unlisted,
)
from megagrow.checkpoint.formats.torch_dist.gathered_optimizer import GROUP, gathered_buffers
from megagrow.checkpoint.formats.torch_dist.parameter_order import (
    Cut,
    ExpertOrder,
    LayerOrder,
    ParameterOrder,
    RankParameter,
)
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index import Chunk, DType, TensorInfo, check_cover, intersect, row_major, text
from megagrow.checkpoint.reading import ChunkReader
from megagrow.checkpoint.tensors import OPTIMIZER_STATES, VOCAB_READ, VOCAB_WRITE, kinds, optimizer_key
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

_BUCKET = re.compile(GROUP + r"gbuf_idx_(\d+)\.dtype_\((.*)\)\.bucket_idx_(\d+)\.(\w+)$")
_OBJECT = re.compile(GROUP + r"(\w+)/shard_")
_EXPERT = "decoder.layers.mlp.experts."
_COMPARED = 64
"""Values, at the beginning of each parameter, that are compared with the model's."""


class _Unproven(CheckpointError):
    """An order of parameters fits the buckets, but behind the first `agreed` of them the values are not the model's."""

    def __init__(self, agreed: int, message: str) -> None:
        super().__init__(message)
        self.agreed = agreed


@dataclass
class _Buffer:
    """A flat buffer: by bucket and state the 1-D tensor; the types of its parameters and gradients as text.

    Where it is `gathered` its buckets are joined to one.
    """

    dtype: str
    gathered: bool
    buckets: dict[int, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def ends(self) -> list[int]:
        """Values of each bucket."""
        return [self.buckets[bucket]["param"].shape[0] for bucket in sorted(self.buckets)]


_Buffers = dict[tuple[int, int], _Buffer]
"""An optimizer's buffers by model-parallel rank and model chunk."""


@dataclass(frozen=True)
class _Order:
    """A way in which the parameters of an optimizer may lie.

    Attributes:
        parameters: what each rank holds.
        cut: how the model was cut.
        experts: whether the optimizer has experts' parameters only, or none of them; None: it has all.
        bucket_size: at which buckets were closed that are joined now, on the first stage; None: never.
    """

    parameters: ParameterOrder
    cut: Cut
    experts: bool | None
    bucket_size: int | None = None

    def held(self, group: int, chunk: int, buffer: _Buffer) -> "list[_Held]":
        """Where the parameters of a buffer lie; CheckpointError unless they fill its buckets to the value."""
        rank = self.cut.expert_rank(group, chunk) if self.experts else self.cut.rank(group, chunk)
        parameters = [each for each in self.parameters.of(rank) if self.experts in (None, each.key.startswith(_EXPERT))]
        numbers = [math.prod(each.shape) for each in parameters]
        alone = [number for number, each in enumerate(parameters) if each.shared]
        if buffer.gathered:
            size = None if rank.pipeline or rank.chunk else self.bucket_size
            layout = bucket_layout(numbers, alone=alone, bucket_size=size).joined()
            if list(layout.sizes) != buffer.ends:
                raise CheckpointError(f"its parameters fill {layout.sizes[0]} values, not {buffer.ends[0]}")
        else:
            layout = bucket_layout(numbers, alone=alone, ends=buffer.ends)
        return [_Held(each, place, buffer) for each, place in zip(parameters, layout.places, strict=True)]


@dataclass(frozen=True)
class _Held:
    """A parameter and where it lies."""

    parameter: RankParameter
    place: BufferRange
    buffer: _Buffer

    def chunks(self, state: str) -> Iterator[Chunk]:
        """Chunks of the canonical tensor that it is, in one of Adam's states."""
        parameter, place = self.parameter, self.place
        stored = self.buffer.buckets[place.bucket][state].chunks
        own = row_major(parameter.shape)
        first = bisect.bisect_right(stored, place.start, key=lambda chunk: chunk.box[0][0]) - 1
        for chunk in itertools.takewhile(lambda chunk: chunk.box[0][0] < place.stop, stored[max(first, 0) :]):
            start, stop = chunk.box[0]
            begin, end = max(start, place.start), min(stop, place.stop)
            for box, skip in boxes_of_range(parameter.shape, begin - place.start, end - place.start):
                for piece in parameter.pieces:
                    if (part := intersect(box, piece.box)) is None:
                        continue
                    skip_more = sum((a - b) * stride for (a, _), (b, _), stride in zip(part, box, own, strict=True))
                    yield replace(
                        chunk,
                        box=piece.place(part),
                        start=chunk.start + begin - start + skip + skip_more,
                        strides=piece.strides(own),
                    )


class FlatOptimizerReader(ChunkReader):
    """A torch_dist checkpoint whose optimizer's buckets are read as the tensors that they hold."""

    def __init__(self, reader: TorchDistReader, states: Mapping[str, TensorInfo]) -> None:
        """Args: the checkpoint, and the tensors that its buckets hold."""
        rest = {key: info for key, info in reader.tensors.items() if not _BUCKET.match(key)}
        objects = {key: chunk for key, chunk in reader.objects.items() if not _OBJECT.match(key)}
        super().__init__(reader.path, {**rest, **states}, objects)
        self._reader = reader

    def common(self) -> dict[str, Any]:
        """Return what is not sharded as a fully reshardable checkpoint has it; parameter groups lie in objects here.

        CheckpointError if it is damaged or would import something foreign.
        """
        common = self._reader.common()
        optimizers: dict[int, dict[str, Any]] = defaultdict(dict)
        for key in self._reader.objects:
            match = _OBJECT.match(key)
            if match and int(match[2]) == 0 and not match[3].startswith(("per_bucket_numel", "param_state")):
                optimizers[int(match[1] or 0)][match[3]] = unlisted(self._reader.read_object(key))
        parts = [optimizers[number] for number in sorted(optimizers)]
        return canonical_common({**common, "optimizer": parts[0] if len(parts) == 1 else dict(enumerate(parts))})


def is_dp_reshardable(reader: ChunkReader) -> bool:
    """Whether a checkpoint's optimizer was saved `dp_reshardable`."""
    return any(_BUCKET.match(key) for key in reader.tensors)


def read_flat_optimizer(
    reader: TorchDistReader, shape: ModelShape, layout: ParallelLayout | None
) -> TorchDistReader | FlatOptimizerReader:
    """Return a checkpoint as if its optimizer had been saved fully reshardable; one that was not flat, as it is.

    Args:
        reader: the checkpoint.
        shape: of its model.
        layout: that it was written in; None: every one with as many ranks is tried.

    Raises:
        CheckpointError: the buckets do not hold the parameters of such a model in an order that is known.
    """
    gathered = gathered_buffers(reader)
    flat = gathered or {key: info for key, info in reader.tensors.items() if _BUCKET.match(key)}
    if not flat:
        return reader
    closed = bucket_sizes(reader.common().get("args") or {}) if gathered else (None,)
    try:
        known = _sizes(reader, shape)
        dense, *experts = (_buffers(reader, flat, number, gathered=bool(gathered)) for number in _optimizers(flat))
        held, order = _find(reader, dense, _dense_orders(dense, shape, layout, known, apart=bool(experts)), closed)
        if experts:
            orders = _expert_orders(experts[0], shape, layout, known, order.cut)
            held += _find(reader, experts[0], orders, closed)[0]
        states = _states(held, known)
    except CheckpointError as error:
        kind = "dp_zero_gather_scatter" if gathered else "dp_reshardable"
        raise CheckpointError(f"{reader.path}: its {kind} optimizer: {error}") from None
    for key, info in states.items():
        check_cover(f"{reader.path}: {key}", info)
    return FlatOptimizerReader(reader, states)


def _sizes(reader: TorchDistReader, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Global shapes of the model's tensors; the vocabulary may be padded as it likes."""
    found = {}
    for kind in kinds(shape):
        if (info := reader.tensors.get(kind.key)) is None:
            raise CheckpointError(f"{kind.key} is missing, which the model's shape has")
        dims = (None, *kind.dims) if kind.per_layer else kind.dims
        wanted = kind.global_shape(shape)
        if len(info.shape) != len(wanted) or any(
            size != own and dim not in (VOCAB_READ, VOCAB_WRITE)
            for size, own, dim in zip(info.shape, wanted, dims, strict=True)
        ):
            raise CheckpointError(f"{kind.key} has shape {info.shape}, the model's is {wanted}")
        found[kind.key] = info.shape
    return found


def _optimizers(flat: Iterable[str]) -> list[int]:
    """Numbers of the optimizers: one, or one for dense parameters and one for those of experts."""
    numbers = {int(match[1] or 0) for key in flat if (match := _BUCKET.match(key))}
    if sorted(numbers) not in ([0], [0, 1]):
        raise CheckpointError(f"there are {len(numbers)} optimizers; known are one, and one more for experts")
    return sorted(numbers)


def _buffers(reader: TorchDistReader, flat: Mapping[str, TensorInfo], optimizer: int, *, gathered: bool) -> _Buffers:
    """The flat buffers of one of the optimizers, checked against what it says of them itself."""
    buffers: _Buffers = {}
    for key, info in flat.items():
        match = _BUCKET.match(key)
        if match and int(match[1] or 0) == optimizer:
            buffer = buffers.setdefault((int(match[2]), int(match[3])), _Buffer(match[4], gathered))
            ordered = sorted(info.chunks, key=lambda chunk: chunk.box)
            buffer.buckets[int(match[5])][match[6]] = replace(info, chunks=tuple(ordered))
    if len(kinds := {buffer.dtype for buffer in buffers.values()}) > 1:
        raise CheckpointError(f"parameters of several types ({'; '.join(sorted(kinds))}); those of one type are read")
    for buffer in buffers.values():
        for states in buffer.buckets.values():
            if set(states) != set(OPTIMIZER_STATES) or not states["param"].dtype.is_floating_point:
                types = {name: str(info.dtype) for name, info in states.items()}
                raise CheckpointError(f"its states are {types}; read are Adam's, {', '.join(OPTIMIZER_STATES)}")
    for key in reader.objects:
        match = _OBJECT.match(key)
        if match and int(match[1] or 0) == optimizer and match[3] == "per_bucket_numel_unpadded":
            said = _told_sizes(reader, key)
            found = [buffers[place].ends for place in sorted(buffers) if place[0] == int(match[2])]
            if said != found:
                raise CheckpointError(f"{key} says {said}, its buckets hold {found} values")
    return buffers


def _told_sizes(reader: TorchDistReader, key: str) -> list[list[int]]:
    """What an object says of the sizes of a rank's buckets, by buffer; CheckpointError if that is something else."""
    content = unlisted(reader.read_object(key))
    try:
        return [list(next(iter(buffer.values()))) for buffer in content]
    except (AttributeError, StopIteration, TypeError) as error:
        raise CheckpointError(f"{key}: damaged: no sizes of buckets: {type(error).__name__}: {error}") from None


def _counts(buffers: _Buffers) -> tuple[int, int]:
    """Model-parallel ranks, and model chunks of each."""
    groups, chunks = ({place[index] for place in buffers} for index in (0, 1))
    if set(buffers) != set(itertools.product(range(len(groups)), range(len(chunks)))):
        raise CheckpointError(f"buffers are missing: there are {sorted(buffers)} (model-parallel rank, model chunk)")
    return len(groups), len(chunks)


def _dense_orders(
    buffers: _Buffers,
    shape: ModelShape,
    layout: ParallelLayout | None,
    known: dict[str, tuple[int, ...]],
    *,
    apart: bool,
) -> Iterator[_Order]:
    """Ways in which the dense parameters may lie, those of experts among them unless they are `apart`."""
    ranks, chunks = _counts(buffers)
    cuts = [Cut(tensor, ranks // tensor, chunks, 1, tensor) for tensor in range(1, ranks + 1) if ranks % tensor == 0]
    if layout is not None:
        tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        wanted = Cut(tensor, pipeline, layout.virtual_pipeline_model_parallel_size or 1, 1, tensor)
        cuts = [cut for cut in cuts if cut == wanted]
        if not cuts:
            said = layout.describe()
            raise CheckpointError(f"{ranks} model-parallel ranks with {chunks} model chunks wrote it, not {said}")
    mixed = shape.num_moe_experts is not None and not apart
    for cut, layers, experts in itertools.product(cuts, LayerOrder, ExpertOrder if mixed else list(ExpertOrder)[:1]):
        parameters = ParameterOrder(shape, known, cut, layers, experts)
        if parameters.fits():
            yield _Order(parameters, cut, False if apart else None)


def _expert_orders(
    buffers: _Buffers, shape: ModelShape, layout: ParallelLayout | None, known: dict[str, tuple[int, ...]], dense: Cut
) -> Iterator[_Order]:
    """Ways in which the parameters of experts may lie in an optimizer of their own."""
    ranks, chunks = _counts(buffers)
    if ranks % dense.pipeline or chunks != dense.virtual:
        raise CheckpointError(f"{ranks} ranks with {chunks} chunks hold experts, of a model that is cut as {dense}")
    per_stage = ranks // dense.pipeline
    for experts in [layout.expert_model_parallel_size] if layout else range(1, per_stage + 1):
        cut = replace(dense, experts=experts, expert_tensor=per_stage // experts)
        for order in ExpertOrder if per_stage % experts == 0 else ():
            parameters = ParameterOrder(shape, known, cut, LayerOrder.LOCAL, order)
            if parameters.fits():
                yield _Order(parameters, cut, True)


def _find(
    reader: TorchDistReader, buffers: _Buffers, orders: Iterable[_Order], closed: Sequence[int | None]
) -> tuple[list[_Held], _Order]:
    """The order in which an optimizer's parameters lie, and where each is; CheckpointError if it is none of these.

    `closed`: sizes at which buckets may have been closed that are joined now.
    """
    unproven: list[_Unproven] = []
    refused: list[CheckpointError] = []
    for order in (replace(order, bucket_size=size) for order in orders for size in closed):
        try:
            held = [each for place, buffer in sorted(buffers.items()) for each in order.held(*place, buffer)]
            _prove(reader, held)
            return held, order
        except _Unproven as error:
            unproven.append(error)
        except CheckpointError as error:
            refused.append(error)
    if unproven:
        raise max(unproven, key=lambda error: error.agreed)
    why = refused[0] if refused else "it cannot be cut over so many ranks"
    raise CheckpointError(f"its buckets do not hold this model's parameters: {why}")


def _prove(reader: TorchDistReader, held: list[_Held]) -> None:
    """Raise _Unproven unless the masters of each parameter begin with the model's own weights, but for rounding."""
    import torch

    masters = ChunkReader(reader.path, {}, {})
    for agreed, each in enumerate(held):
        parameter = each.parameter
        info = reader.tensors[parameter.key]
        dtype = each.buffer.buckets[each.place.bucket]["param"].dtype
        masters.tensors = {parameter.key: TensorInfo(info.shape, dtype, tuple(each.chunks("param")))}
        for box, _ in boxes_of_range(parameter.shape, 0, min(_COMPARED, math.prod(parameter.shape))):
            for piece in parameter.pieces:
                if (part := intersect(box, piece.box)) is None:
                    continue
                where = piece.place(part)
                if not torch.equal(
                    masters.read(parameter.key, where).to(info.dtype.torch), reader.read(parameter.key, where)
                ):
                    raise _Unproven(
                        agreed,
                        f"its masters are not the model's weights in any known order of parameters: they differ in "
                        f"{parameter.key} {text(where)}",
                    )


def _states(held: list[_Held], known: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """The canonical tensors of the optimizer."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    dtypes: dict[str, DType] = {}
    for state, each in itertools.product(OPTIMIZER_STATES, held):
        if each.parameter.counts:
            key = optimizer_key(state, each.parameter.key)
            chunks[key] += each.chunks(state)
            dtypes[key] = each.buffer.buckets[each.place.bucket][state].dtype
    shapes = {optimizer_key(state, key): shape for key, shape in known.items() for state in OPTIMIZER_STATES}
    return {key: TensorInfo(shape, dtypes.get(key, DType.FLOAT32), tuple(chunks[key])) for key, shape in shapes.items()}
