"""Flat buffers: tensors packed end to end, of which only ranges are to be had.

Megatron's distributed optimizer packs the parameters of a rank into a buffer, last one first, cuts the buffer into
buckets and each bucket over data-parallel ranks. So what lies in a file is a range of a tensor that lies row by row.
Two questions have to be answered to read that: which parameter begins where (`bucket_layout`), and which boxes of a
tensor are a range of its values (`boxes_of_range`). The first is arithmetic on sizes that must come out exactly.

Source: Megatron-Core 0.16.1, `distributed/param_and_grad_buffer.py`, `_ParamAndGradBuffer.__init__`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagrow.checkpoint.index import Box, TensorInfo, row_major, whole
from megagrow.errors import CheckpointError

PARAMETER_ALIGNMENT = 64
"""Values: with the distributed optimizer a parameter begins at a multiple of it, in its buffer and in its bucket."""


@dataclass(frozen=True)
class BufferRange:
    """Where a parameter lies: its bucket, and the range of values in it."""

    bucket: int
    start: int
    stop: int


@dataclass(frozen=True)
class Buckets:
    """A buffer cut into buckets.

    Attributes:
        places: of the parameters, in the order in which they were given.
        sizes: values of each bucket before it is padded for the data-parallel ranks.
    """

    places: tuple[BufferRange, ...]
    sizes: tuple[int, ...]

    def joined(self) -> "Buckets":
        """The same end to end without that padding, as one bucket: as they lie in distrib_optim.pt."""
        starts = [sum(self.sizes[:bucket]) for bucket in range(len(self.sizes))]
        moved = ((starts[place.bucket], place) for place in self.places)
        return Buckets(
            tuple(BufferRange(0, start + place.start, start + place.stop) for start, place in moved), (sum(self.sizes),)
        )


def bucket_layout(
    sizes: Sequence[int],
    *,
    alone: Collection[int] = (),
    bucket_size: int | None = None,
    ends: Sequence[int] | None = None,
) -> Buckets:
    """Return where the parameters of a buffer lie, as the distributed optimizer packs them: the last one first.

    Neither the number of data-parallel ranks nor what buckets are padded to changes anything inside a bucket.

    Args:
        sizes: values of each parameter, in the order of the model's modules.
        alone: numbers of those that have a bucket of their own: embeddings that two pipeline stages share.
        bucket_size: a bucket is closed when it has so many values; None: never (no overlap_grad_reduce, or not the
            first pipeline stage or model chunk).
        ends: sizes of the buckets, where they are known (`per_bucket_numel_unpadded`); instead of `bucket_size`.

    Raises:
        CheckpointError: the parameters do not fill buckets of these sizes.
    """
    places: list[BufferRange | None] = [None] * len(sizes)
    found: list[int] = []
    at = 0
    for number in reversed(range(len(sizes))):
        start = math.ceil(at / PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT
        if number in alone and at:
            found.append(start)  # the gap before the next parameter counts as the closed bucket's
            start = 0
        at = start + sizes[number]
        places[number] = BufferRange(len(found), start, at)
        full = bucket_size is not None and at >= bucket_size
        if ends is not None:
            full = len(found) < len(ends) and at == ends[len(found)]
        if number in alone or full:
            found.append(at)
            at = 0
    if at:
        found.append(at)
    if ends is not None and list(ends) != found:
        raise CheckpointError(f"{len(sizes)} parameters fill buckets of {found} values, not of {list(ends)}")
    return Buckets(tuple(place for place in places if place is not None), tuple(found))


def bucket_sizes(args: Mapping[str, Any]) -> Sequence[int | None]:
    """Sizes at which the buckets of the first pipeline stage's first chunk may have been closed: one, if args say it.

    Those of all other stages and chunks never are.
    """
    if args.get("overlap_grad_reduce") is False:
        return (None,)
    usual = max(40_000_000, 1_000_000 * (args.get("data_parallel_size") or 1))
    if args.get("overlap_grad_reduce") and not args.get("ddp_num_buckets"):
        return (args.get("ddp_bucket_size") or usual,)
    return (None, usual)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[tuple[Box, int]]:
    """Return the boxes of a row-major tensor that a range of its values is, in its order.

    Args:
        shape: of the tensor.
        start, stop: of the range, in values.

    Returns:
        At most 2 n - 1 boxes for n dimensions, each with the number of the range's values before its first one.
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
        result.append(((rows, *whole(shape[1:])), head))
    if tail:
        boxes = boxes_of_range(shape[1:], 0, tail)
        result += [(((last, last + 1), *box), stop - start - tail + before) for box, before in boxes]
    return result


def unflattened(info: TensorInfo, original: tuple[int, ...] | None) -> TensorInfo:
    """A tensor as it was before Megatron-Core laid the values of each rank's part end to end.

    A tensor of shape [X, Y] of which each tensor-parallel rank has [x, y] was written as [X/x, Y/y, x y], and the
    last dimension cut over data-parallel ranks.
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
        *place, (start, stop) = chunk.box
        if any(b - a != 1 for a, b in place) or chunk.strides is not None:
            return info
        for box, skip in boxes_of_range(local, start, stop):
            moved = tuple((a + n * size, b + n * size) for (a, b), (n, _), size in zip(box, place, local, strict=True))
            chunks.append(replace(chunk, box=moved, start=skip, strides=row_major(local)))
    return replace(info, shape=original, chunks=tuple(chunks))
