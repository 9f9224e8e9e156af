"""Reads the source rows that a box of a target tensor needs, as raw bit patterns, and copies values bit for bit.

Rows are gathered while they are read: a row that is not wanted is never read, and the source is never in memory as a
whole. Values are not interpreted here, so this module needs no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megagrow.checkpoint.index import Box, DType, Raw, Source, sizes, volume, whole_box
from megagrow.checkpoint.tensors import TensorKind, dimensions, optimizer_key
from megagrow.convert.plan import ConversionPlan, Task
from megagrow.growth.maps import NO_SOURCE, DimMap, Indices, consecutive_runs

PIECE_VALUES = 2 << 20
"""Largest number of values in a piece, if memory allows: 8 MiB in float32."""


@dataclass(frozen=True)
class Piece:
    """The values of one box of a target tensor.

    Attributes:
        key: of the target tensor.
        corner: index of the box's first entry in the global tensor.
        values: bit patterns in row-major order; per-layer tensors have the layer as first dimension.
        dtype: type of the values.
    """

    key: str
    corner: tuple[int, ...]
    values: Raw
    dtype: DType


class SourceRows:
    """Cuts boxes of target tensors into pieces and reads the source rows of each; the base of both makers."""

    def __init__(self, conversion: ConversionPlan, source: Source, piece_values: int = PIECE_VALUES) -> None:
        self._conversion = conversion
        self._step = conversion.step
        self._source = source
        self._limit = piece_values
        self._dims: dict[str, tuple[DimMap, ...]] = {}

    def cut(self, kind: TensorKind, box: Box) -> Iterator[Box]:
        """Cut a box into pieces of whole rows, expert by expert, in row-major order.

        A router stays whole, since noise on its rows is relative to the standard deviation of all of them.
        """
        if kind.dims[0] is dimensions.ROUTER_ROWS:
            yield box
            return
        if kind.per_expert:
            (first, last), *rest = box
            for expert in range(first, last):
                for rows in self._cut_rows(tuple(rest)):
                    yield ((expert, expert + 1), *rows)
            return
        yield from self._cut_rows(box)

    def _cut_rows(self, box: Box) -> Iterator[Box]:
        (first, last), *rest = box
        at_once = max(1, self._limit // max(1, volume(tuple(rest))))
        for start in range(first, last, at_once):
            yield ((start, min(start + at_once, last)), *rest)

    def _piece(self, task: Task, key: str, box: Box, values: Raw, dtype: DType) -> Piece:
        corner = tuple(start for start, _ in box)
        if task.layer is None:
            return Piece(key, corner, values, dtype)
        return Piece(key, (task.layer, *corner), values[None], dtype)

    def _copy_values(self, task: Task, box: Box) -> Raw:
        """The values of a box whose entries are all entries of the source, bit for bit."""
        assert task.origin is not None
        parts = [dim.part(start, stop) for dim, (start, stop) in zip(self._maps(task.kind), box, strict=True)]
        values = self._gathered(task, self._conversion.weights_key(task.origin), parts)
        for axis in range(row_axis(task.kind) + 1, len(parts)):
            if not _is_identity(parts[axis]):
                values = values.take(parts[axis].source, axis)
        return values

    def _gathered(self, task: Task, key: str, parts: list[DimMap]) -> Raw:
        """The wanted rows of a task's source (with experts, of one of them), in the target's order."""
        prefix, wanted, tail = self._wanted(task, parts)
        runs = consecutive_runs(wanted)
        if len(runs) == 1 and runs[0][2] == len(wanted):
            _, start, length = runs[0]
            values = self._rows(key, prefix, start, length, tail)
        else:
            values = np.empty((len(wanted), *sizes(tail)), self._source.tensors[key].dtype.raw)
            for target, start, length in runs:
                values[target : target + length] = self._rows(key, prefix, start, length, tail)
        return values[None] if task.kind.per_expert else values

    def _wanted(self, task: Task, parts: list[DimMap]) -> tuple[Box, Indices, Box]:
        """The position of a part's rows in the source: (layer and expert, rows, the extent of one row)."""
        rows = row_axis(task.kind)
        prefix: Box = () if task.source_layer is None else ((task.source_layer, task.source_layer + 1),)
        wanted, tail = parts[rows].source, whole_box(tuple(part.size for part in parts[rows + 1 :]))
        if rows and task.origin is not None and task.origin.per_expert:
            expert = int(parts[0].source[0])
            prefix = (*prefix, (expert, expert + 1))
        elif rows:
            wanted, tail = self._slice_of_dense(task, int(parts[0].source[0]), wanted, tail)
        return prefix, wanted, tail

    def _rows(self, key: str, prefix: Box, start: int, length: int, tail: Box) -> Raw:
        values = self._source.raw(key, (*prefix, (start, start + length), *tail))
        return values.reshape((length, *sizes(tail)))

    def _slice_of_dense(self, task: Task, index: int, wanted: Indices, tail: Box) -> tuple[Indices, Box]:
        """The rows and columns of a dense MLP's tensor that become one expert."""
        assert task.origin is not None and task.origin.tensor_parallel is not None and self._step.experts is not None
        dim, blocks = task.origin.tensor_parallel
        count = self._step.experts.expert.size
        if dim == 0:
            width = self._maps(task.kind)[1].size // blocks
            block, inside = np.divmod(wanted, width)
            dense = block * (count * width) + index * width + inside
            return np.where(wanted == NO_SOURCE, NO_SOURCE, dense), tail
        (_, width), *rest = tail
        return wanted, ((index * width, (index + 1) * width), *rest)

    def _maps(self, kind: TensorKind) -> tuple[DimMap, ...]:
        """The maps of a kind's dimensions; all layers share them."""
        if kind.key not in self._dims:
            self._dims[kind.key] = tuple(dim.grow(self._step) for dim in kind.dims)
        return self._dims[kind.key]

    def _forget(self, task: Task, box: Box, state: str | None) -> None:
        """Let the kernel drop source values that no later task reads.

        Of a tensor that several units share, only a consecutive run of rows is dropped.
        """
        if task.origin is None or not task.last:
            return
        key = task.origin.key if state is None else optimizer_key(state, task.origin.key)
        front: Box = () if task.source_layer is None else ((task.source_layer, task.source_layer + 1),)
        rest = whole_box(self._source.tensors[key].shape[len(front) :])
        if box != whole_box(task.kind.layer_shape(self._step.large)):
            runs = consecutive_runs(self._maps(task.kind)[0].part(*box[0]).source)
            if task.kind.per_expert or len(runs) != 1:
                return
            _, start, length = runs[0]
            rest = ((start, start + length), *rest[1:])
        self._source.forget(key, (*front, *rest))


def row_axis(kind: TensorKind) -> int:
    """The dimension of a layer's tensor that holds its rows; experts come before it."""
    return 1 if kind.per_expert else 0


def _is_identity(dim: DimMap) -> bool:
    return len(dim) == dim.size and bool((dim.source == np.arange(dim.size)).all())
