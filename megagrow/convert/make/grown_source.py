"""A grown model as a source: any box of its tensors is computed when it is read, from the parent's values.

With it a format that can only be written from a source is written from a parent in one pass, and no checkpoint of the
grown model is needed in between.
"""

from typing import TYPE_CHECKING

import numpy as np

from megagrow.checkpoint.index import Box, Raw, Source, TensorInfo, sizes, tensor_of, whole_box
from megagrow.checkpoint.tensors import dimensions, tensor_kinds
from megagrow.convert.make.maker import maker_of
from megagrow.convert.make.rows import PIECE_VALUES
from megagrow.convert.plan import ConversionPlan

if TYPE_CHECKING:
    from torch import Tensor


class GrownSource:
    """The weights of a conversion's target, without any optimizer state.

    Attributes:
        tensors: its index; the tensors have no chunks, as no file holds them.
    """

    def __init__(self, conversion: ConversionPlan, source: Source, piece_values: int = PIECE_VALUES) -> None:
        assert not conversion.optimizer, "only weights are made on reading"
        self._maker = maker_of(conversion, source, piece_values)
        self._tasks = {(task.kind.key, task.layer): task for task in conversion.tasks}
        large = conversion.step.large
        self._kinds = {kind.key: kind for kind in tensor_kinds(large)}
        self._large = large
        self.tensors = {
            key: TensorInfo(kind.global_shape(large), conversion.weight_dtype_of(key), ())
            for key, kind in self._kinds.items()
        }

    def raw(self, key: str, box: Box) -> Raw:
        """Return the bit patterns of a box of a grown tensor."""
        kind = self._kinds[key]
        if not kind.per_layer:
            return self._layer(key, None, box)
        (first, last), *rest = box
        return np.stack([self._layer(key, layer, tuple(rest)) for layer in range(first, last)])

    def read(self, key: str, box: Box) -> "Tensor":
        """Return the values of a box of a grown tensor."""
        return tensor_of(self.raw(key, box), self.tensors[key].dtype)

    def forget(self, key: str, box: Box) -> None:
        """Do nothing: the maker forgets what it has read of the parent."""

    def _layer(self, key: str, layer: int | None, box: Box) -> Raw:
        """A box of one layer's tensor. A router is made whole, since noise on its rows depends on all of them."""
        kind = self._kinds[key]
        made = whole_box(kind.layer_shape(self._large)) if kind.dims[0] is dimensions.ROUTER_ROWS else box
        values = np.empty(sizes(made), self.tensors[key].dtype.raw)
        for piece in self._maker.pieces(self._tasks[key, layer], made):
            corner, part = (piece.corner, piece.values) if layer is None else (piece.corner[1:], piece.values[0])
            starts = [at - start for at, (start, _) in zip(corner, made, strict=True)]
            values[tuple(slice(at, at + size) for at, size in zip(starts, part.shape, strict=True))] = part
        inside = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, made, strict=True))
        return np.ascontiguousarray(values[inside])
