"""Plans the reads that fill a box of a tensor from strided values in files: decisions only, no I/O.

`plan_reads` takes the boxes of a result with the offsets and strides of their values, and yields reads in file order.
Values that are stored in the order of the result, without gaps, are read straight into it. All others pass through a
buffer of `ReadPolicy.block` bytes: small gaps are read and dropped, large ones are skipped, and boxes whose values
alternate in the file (such as q, k and v of every head) share reads. Plans are lazy, so a long one needs no memory.

Plans consist of named tuples, which are as immutable as frozen dataclasses but cost half the time to create; a column
of a matrix takes one for each of its rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add, mul
from typing import NamedTuple

from megagrow.checkpoint.index import Box, Chunk, row_major, sizes

BLOCK = 4 << 20
"""Bytes of the buffer through which scattered values pass."""


@dataclass(frozen=True)
class ReadPolicy:
    """How much a single read may take.

    Attributes:
        block: largest buffered read, in bytes.
        max_waste: largest ratio of the bytes of a read, gaps included, to the bytes of the result.
        read_cost: number of bytes whose reading takes as long as one more read (48 us where this was measured).
            Boxes that alternate in a file share reads if a row of the file has at most this many bytes per box.
    """

    block: int = BLOCK
    max_waste: int = 4
    read_cost: int = 32 << 10


class StridedBox(NamedTuple):
    """A box of a result and the strided values in a file that fill it.

    Attributes:
        start, lengths: the box, in the result.
        path: the file.
        offset: byte of the first value in the file.
        strides: values of the file from one entry to the next, in every dimension.
    """

    start: tuple[int, ...]
    lengths: tuple[int, ...]
    path: str
    offset: int
    strides: tuple[int, ...]

    @property
    def region(self) -> tuple[slice, ...]:
        """The box as an index into the result."""
        return tuple(map(slice, self.start, map(add, self.start, self.lengths)))

    @property
    def span(self) -> int:
        """Values of the file from the first to the last, gaps included."""
        products: Iterable[int] = map(mul, self.lengths, self.strides)
        return 1 + sum(products) - sum(self.strides)

    @property
    def row_dim(self) -> int:
        """The dimension with the longest stride, whose entries are the rows of the file."""
        return max((dim for dim, n in enumerate(self.lengths) if n > 1), key=self.strides.__getitem__, default=0)

    @property
    def rows(self) -> tuple[int, int]:
        """Number of rows, and values from one row to the next."""
        dim = self.row_dim
        return (self.lengths[dim], self.strides[dim]) if self.lengths else (1, 0)

    @property
    def row_span(self) -> int:
        """Values from the first to the last of one row."""
        count, stride = self.rows
        return self.span - (count - 1) * stride

    def narrow(self, dim: int, first: int, length: int, itemsize: int) -> "StridedBox":
        """The part of the box with `length` entries of a dimension from `first` on."""
        start = (*self.start[:dim], self.start[dim] + first, *self.start[dim + 1 :])
        lengths = (*self.lengths[:dim], length, *self.lengths[dim + 1 :])
        return StridedBox(start, lengths, self.path, self.offset + first * self.strides[dim] * itemsize, self.strides)


class DirectRead(NamedTuple):
    """A read straight into the result, from its byte `into` on."""

    path: str
    offset: int
    length: int
    into: int


class BufferedRead(NamedTuple):
    """A read into the buffer, from which `boxes` are then copied; each box's `offset` is its byte of the file."""

    path: str
    offset: int
    length: int
    boxes: tuple[StridedBox, ...]


Read = DirectRead | BufferedRead


def plan_reads(
    boxes: Iterable[StridedBox], shape: tuple[int, ...], itemsize: int, policy: ReadPolicy
) -> Iterator[Read]:
    """Yield the reads that fill a contiguous result.

    Args:
        boxes: its boxes, none of them empty, in any order.
        shape: of the result.
        itemsize: bytes of a value.
        policy: how much a single read may take.
    """
    result_strides = row_major(shape)
    for group in _interleaved(sorted(boxes, key=lambda box: (box.path, box.offset)), itemsize):
        if rows := _rows_per_shared_read(group, itemsize, policy):
            yield from _read_together(group, rows, itemsize)
        else:
            for box in group:
                yield from _read_separately(box, result_strides, itemsize, policy)


def strided_box(
    chunk: Chunk, common: Box, box: Box, offset: int, strides: tuple[int, ...], itemsize: int
) -> StridedBox:
    """Return the part of a chunk that overlaps a box, as a box of the result.

    Args:
        chunk, common: the chunk, and the box that it shares with `box`.
        box: the box to read, in the global tensor like the other two.
        offset, strides: byte of the chunk's first value in its file, and the strides of its values.
        itemsize: bytes of a value.
    """
    skipped = sum((a - start) * stride for (a, _), (start, _), stride in zip(common, chunk.box, strides, strict=True))
    start = tuple(a - first for (a, _), (first, _) in zip(common, box, strict=True))
    return StridedBox(start, sizes(common), chunk.path, offset + skipped * itemsize, strides)


def chunks_by_layer(chunks: Iterable[Chunk], max_layers: int) -> Mapping[int, Sequence[Chunk]]:
    """Group a tensor's chunks by their entries of its first dimension; empty where a chunk has `max_layers` or more."""
    layers: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        first, stop = chunk.box[0]
        if stop - first >= max_layers:
            return {}
        for layer in range(first, stop):
            layers.setdefault(layer, []).append(chunk)
    return layers


def _interleaved(boxes: Iterable[StridedBox], itemsize: int) -> Iterator[list[StridedBox]]:
    """Group boxes, sorted by offset, so that each but the first of a group begins before an earlier one ends."""
    group: list[StridedBox] = []
    end = 0
    for box in boxes:
        if group and (box.path != group[0].path or box.offset >= end):
            yield group
            group, end = [], 0
        group.append(box)
        end = max(end, box.offset + box.span * itemsize)
    if group:
        yield group


def _rows_per_shared_read(group: Sequence[StridedBox], itemsize: int, policy: ReadPolicy) -> int:
    """Return how many rows of the file to read at a time for all boxes of a group; 0 to read each box on its own."""
    if len(group) == 1:
        return 0
    rows, width = group[0].rows, _row_width(group, itemsize)
    stride = rows[1]
    alike = all(box.rows == rows and box.row_span <= stride for box in group)
    if not alike or width > stride or stride * itemsize > policy.read_cost * len(group):
        return 0
    return max(0, (policy.block // itemsize - width) // stride + 1)


def _row_width(group: Sequence[StridedBox], itemsize: int) -> int:
    """Values of a row from the first to the last that the boxes of a group need."""
    return max((box.offset - group[0].offset) // itemsize + box.row_span for box in group)


def _read_together(group: Sequence[StridedBox], at_once: int, itemsize: int) -> Iterator[Read]:
    """Read the rows of the file, `at_once` at a time, for all boxes of a group."""
    (count, stride), width = group[0].rows, _row_width(group, itemsize)
    dims = [box.row_dim for box in group]
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        yield BufferedRead(
            group[0].path,
            group[0].offset + first * stride * itemsize,
            ((rows - 1) * stride + width) * itemsize,
            tuple(box.narrow(dim, first, rows, itemsize) for box, dim in zip(group, dims, strict=True)),
        )


def _read_separately(
    box: StridedBox, result_strides: tuple[int, ...], itemsize: int, policy: ReadPolicy
) -> Iterator[Read]:
    """Read one box: directly, through the buffer, or some rows at a time."""
    lengths, strides = box.lengths, box.strides
    direct, count = True, 1  # direct: without gaps and in the same order on both sides
    for dim in range(len(lengths) - 1, -1, -1):
        direct = direct and (lengths[dim] == 1 or strides[dim] == result_strides[dim] == count)
        count *= lengths[dim]
    if direct:
        into = sum(map(mul, box.start, result_strides))
        yield DirectRead(box.path, box.offset, count * itemsize, into * itemsize)
        return
    span = box.span
    wasteful = span > policy.max_waste * count
    if not wasteful and span * itemsize <= policy.block:
        yield BufferedRead(box.path, box.offset, span * itemsize, (box,))
        return
    dim = box.row_dim
    rows = 1 if wasteful else max(1, (policy.block // itemsize - box.row_span) // strides[dim] + 1)
    for first in range(0, lengths[dim], rows):
        part = box.narrow(dim, first, min(rows, lengths[dim] - first), itemsize)
        yield from _read_separately(part, result_strides, itemsize, policy)
