"""The rows of the source that a box of a grown tensor needs, as they lie in its files: for sums and for copies alike.

Rows are gathered while they are read, so a row that is not wanted is never read, and the source is never whole in
memory. Nothing here knows what values mean, so nothing here needs torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megagrow.checkpoint.index import Box, DType, Raw, Source, sizes, volume, whole
from megagrow.checkpoint.tensors import TensorKind, dimensions, optimizer_key
from megagrow.growth.maps import NO_SOURCE, DimMap, Indices, consecutive_runs

if TYPE_CHECKING:
    from megagrow.convert.plan import ConversionPlan, Task
PIECE_VALUES = 2 << 20
"""Values of a piece where memory allows: 8 MiB in float32."""


@dataclass(frozen=True)
class Piece:
    """A box of a target tensor.

    Attributes:
        key: of the target tensor.
        corner: of the box's first entry in the global tensor.
        values: row by row; of per-layer tensors with the layer dimension in front.
        dtype: what they mean.
    """

    key: str
    corner: tuple[int, ...]
    values: Raw
    dtype: DType


class Rows:
    """Cuts boxes into pieces and reads what they are made of."""

    def __init__(self, conversion: "ConversionPlan", source: Source, piece_values: int = PIECE_VALUES) -> None:
        self._conversion = conversion
        self._step = conversion.step
        self._source = source
        self._limit = piece_values
        self._dims: dict[str, tuple[DimMap, ...]] = {}

    def cut(self, kind: TensorKind, box: Box) -> Iterator[Box]:
        """Cut a box into pieces of whole rows, expert by expert, in row-major order.

        A router stays whole: noise on its rows is relative to the deviation of all.
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

    def _piece(self, task: "Task", key: str, box: Box, values: Raw, dtype: DType) -> Piece:
        corner = tuple(start for start, _ in box)
        if task.layer is None:
            return Piece(key, corner, values, dtype)
        return Piece(key, (task.layer, *corner), values[None], dtype)

    def _gathered(self, task: "Task", key: str, parts: list[DimMap]) -> Raw:
        """The wanted rows of a task's source (of one expert's, where there are experts), in the target's order."""
        prefix, wanted, tail = self._wanted(task, parts)
        found = consecutive_runs(wanted)
        if len(found) == 1 and found[0][2] == len(wanted):
            _, begin, length = found[0]
            values = self._rows(key, prefix, begin, length, tail)
        else:
            values = np.empty((len(wanted), *sizes(tail)), self._source.tensors[key].dtype.raw)
            for target, begin, length in found:
                values[target : target + length] = self._rows(key, prefix, begin, length, tail)
        return values[None] if task.kind.per_expert else values

    def _wanted(self, task: "Task", parts: list[DimMap]) -> tuple[Box, Indices, Box]:
        """Where a part's rows lie in the source: layer and expert, rows, and all that is in a row."""
        rows = 1 if task.kind.per_expert else 0
        prefix: Box = () if task.source_layer is None else ((task.source_layer, task.source_layer + 1),)
        wanted, tail = parts[rows].source, whole(tuple(part.size for part in parts[rows + 1 :]))
        if rows and task.origin is not None and task.origin.per_expert:
            expert = int(parts[0].source[0])
            prefix = (*prefix, (expert, expert + 1))
        elif rows:
            wanted, tail = self._slice_of_dense(task, int(parts[0].source[0]), wanted, tail)
        return prefix, wanted, tail

    def _rows(self, key: str, prefix: Box, begin: int, length: int, tail: Box) -> Raw:
        values = self._source.raw(key, (*prefix, (begin, begin + length), *tail))
        return values.reshape((length, *sizes(tail)))

    def _slice_of_dense(self, task: "Task", index: int, wanted: Indices, tail: Box) -> tuple[Indices, Box]:
        """Rows and columns of a dense MLP's tensor that are those of one of its slices."""
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
        """The maps of a kind's dimensions: the same for every layer."""
        if kind.key not in self._dims:
            self._dims[kind.key] = tuple(dim.grow(self._step) for dim in kind.dims)
        return self._dims[kind.key]

    def _forget(self, task: "Task", box: Box, state: str | None) -> None:
        """Let the kernel drop what no later task reads: of a tensor that several units share only a run of rows."""
        if task.origin is None or not task.last:
            return
        key = task.origin.key if state is None else optimizer_key(state, task.origin.key)
        front: Box = () if task.source_layer is None else ((task.source_layer, task.source_layer + 1),)
        rest = whole(self._source.tensors[key].shape[len(front) :])
        if box != whole(task.kind.layer_shape(self._step.large)):
            found = consecutive_runs(self._maps(task.kind)[0].part(*box[0]).source)
            if task.kind.per_expert or len(found) != 1:
                return
            _, begin, length = found[0]
            rest = ((begin, begin + length), *rest[1:])
        self._source.forget(key, (*front, *rest))
