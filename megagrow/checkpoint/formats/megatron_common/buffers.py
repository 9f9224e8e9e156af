"""Flat buffers: how Megatron's distributed optimizer packs parameters, and how ranges of values become boxes.

The optimizer packs the parameters of a rank into a buffer, last one first, cuts the buffer into buckets and each
bucket over data-parallel ranks. A file therefore contains ranges of row-major tensors. Reading one takes two answers:
where each parameter starts (`bucket_layout`), and which boxes of a tensor a range of its values covers
(`boxes_of_range`). The first is arithmetic on sizes, and the total must match exactly.

Source: Megatron-Core 0.16.1, `distributed/param_and_grad_buffer.py`, `_ParamAndGradBuffer.__init__`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagrow.checkpoint.index import Box, TensorInfo, row_major, whole_box
from megagrow.errors import CheckpointError

PARAMETER_ALIGNMENT = 64
"""Values: the distributed optimizer starts each parameter at a multiple of this, in its buffer and in its bucket."""


@dataclass(frozen=True)
class BufferRange:
    """Position of a parameter in a buffer: its bucket, and its range of values in that bucket."""

    bucket: int
    start: int
    stop: int


@dataclass(frozen=True)
class BucketLayout:
    """How the parameters of a buffer are packed into buckets.

    Attributes:
        ranges: of the parameters, in the order in which they were given.
        sizes: values in each bucket, without the padding for data-parallel ranks.
    """

    ranges: tuple[BufferRange, ...]
    sizes: tuple[int, ...]

    def joined(self) -> "BucketLayout":
        """The layout with all buckets end to end as one, without padding, as distrib_optim.pt stores them."""
        starts = [sum(self.sizes[:bucket]) for bucket in range(len(self.sizes))]
        moved = ((starts[each.bucket], each) for each in self.ranges)
        return BucketLayout(
            tuple(BufferRange(0, start + each.start, start + each.stop) for start, each in moved), (sum(self.sizes),)
        )


def bucket_layout(
    sizes: Sequence[int],
    *,
    own_bucket: Collection[int] = (),
    bucket_size: int | None = None,
    known_sizes: Sequence[int] | None = None,
) -> BucketLayout:
    """Return the positions of a buffer's parameters as the distributed optimizer packs them: the last one first.

    Positions inside a bucket depend neither on the number of data-parallel ranks nor on the padding of buckets.

    Args:
        sizes: values in each parameter, in the order of the model's modules.
        own_bucket: numbers of the parameters with a bucket of their own: embeddings that two pipeline stages share.
        bucket_size: number of values at which a bucket is closed; None: never (without overlap_grad_reduce, and
            outside the first pipeline stage and model chunk).
        known_sizes: sizes of the buckets if they are recorded (`per_bucket_numel_unpadded`); replaces `bucket_size`.

    Raises:
        CheckpointError: the parameters do not fill buckets of these sizes.
    """
    ranges: list[BufferRange | None] = [None] * len(sizes)
    closed: list[int] = []
    end = 0
    for number in reversed(range(len(sizes))):
        start = math.ceil(end / PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT
        if number in own_bucket and end:
            closed.append(start)  # the alignment gap before this parameter belongs to the bucket just closed
            start = 0
        end = start + sizes[number]
        ranges[number] = BufferRange(len(closed), start, end)
        full = bucket_size is not None and end >= bucket_size
        if known_sizes is not None:
            full = len(closed) < len(known_sizes) and end == known_sizes[len(closed)]
        if number in own_bucket or full:
            closed.append(end)
            end = 0
    if end:
        closed.append(end)
    if known_sizes is not None and list(known_sizes) != closed:
        raise CheckpointError(f"{len(sizes)} parameters fill buckets of {closed} values, not of {list(known_sizes)}")
    return BucketLayout(tuple(each for each in ranges if each is not None), tuple(closed))


def possible_bucket_sizes(args: Mapping[str, Any]) -> Sequence[int | None]:
    """Return the sizes at which buckets may have been closed: one if the arguments specify it, else all candidates.

    They apply to the first chunk of the first pipeline stage; in all others no bucket is ever closed by its size.
    """
    if args.get("overlap_grad_reduce") is False:
        return (None,)
    default = max(40_000_000, 1_000_000 * (args.get("data_parallel_size") or 1))
    if args.get("overlap_grad_reduce") and not args.get("ddp_num_buckets"):
        return (args.get("ddp_bucket_size") or default,)
    return (None, default)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[tuple[Box, int]]:
    """Return the boxes of a row-major tensor that together are a range of its values, in the order of the values.

    Args:
        shape: of the tensor.
        start, stop: of the range, in values.

    Returns:
        At most 2 n - 1 boxes for n dimensions, each with the number of values of the range that precede it.
    """
    if start >= stop:
        return []
    if not shape:
        return [((), 0)]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        inner = boxes_of_range(shape[1:], start - first * row, stop - first * row)
        return [(((first, first + 1), *box), before) for box, before in inner]
    head, tail = (0 if start % row == 0 else row - start % row), stop % row
    boxes = boxes_of_range(shape[1:], start % row, row) if head else []
    result: list[tuple[Box, int]] = [(((first, first + 1), *box), before) for box, before in boxes]
    rows = (first + bool(head), last + (not tail))
    if rows[0] < rows[1]:
        result.append(((rows, *whole_box(shape[1:])), head))
    if tail:
        boxes = boxes_of_range(shape[1:], 0, tail)
        result += [(((last, last + 1), *box), stop - start - tail + before) for box, before in boxes]
    return result


def unflattened(info: TensorInfo, original: tuple[int, ...] | None) -> TensorInfo:
    """Return a tensor in the shape it had before Megatron-Core flattened each rank's part of it.

    A tensor of shape [X, Y] of which each tensor-parallel rank holds [x, y] was written as [X/x, Y/y, x y], with the
    last dimension cut over data-parallel ranks. Any other tensor is returned as it is.
    """
    if original is None:
        return info
    grid = info.shape[:-1]
    if len(grid) != len(original) or any(size % n for size, n in zip(original, grid, strict=True)):
        return info
    local = tuple(size // n for size, n in zip(original, grid, strict=True))
    if math.prod(local) != info.shape[-1]:
        return info
    chunks = []
    for chunk in info.chunks:
        *part, (start, stop) = chunk.box
        if any(b - a != 1 for a, b in part) or chunk.strides is not None:
            return info
        for box, skip in boxes_of_range(local, start, stop):
            moved = tuple((a + n * size, b + n * size) for (a, b), (n, _), size in zip(box, part, local, strict=True))
            chunks.append(replace(chunk, box=moved, start=skip, strides=row_major(local)))
    return replace(info, shape=original, chunks=tuple(chunks))
