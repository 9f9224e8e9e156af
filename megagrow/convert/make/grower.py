"""Computes any box of a target tensor from the parts of the source that it needs.

A piece is made in three steps: rows are gathered while they are read (a row that is not wanted is never read, and the
source is never in memory as a whole), columns are gathered in memory, and entries without a source are filled. The
values are the same bits for any cut: random entries depend on their index in the whole tensor, and the mean that
LayerNorm's padding subtracts is summed over the source in steps that do not depend on the cut.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megagrow.checkpoint.index import Box, DType, Source, raw_of, sizes, tensor_of, volume
from megagrow.checkpoint.tensors import TensorKind, dimensions, optimizer_key
from megagrow.convert.make.rows import PIECE_VALUES, Piece, SourceRows, row_axis
from megagrow.convert.plan import ConversionPlan, Recipe, Task, is_silenced
from megagrow.growth.maps import DimMap, GrowthStep, Inside, Moments, Silence
from megagrow.growth.values.grow import TensorRegion, grow_moment, grow_values, initial_part, roughen

_MOMENTS = (("exp_avg", 1), ("exp_avg_sq", 2))
"""Adam's moments, each with the power of the gradient that it averages."""
_MEAN_VALUES = 1 << 18
"""Values that are summed at a time for a mean."""


class Grower(SourceRows):
    """Makes the pieces of any conversion: weights by each task's recipe, moments by the moment policy."""

    def __init__(self, conversion: ConversionPlan, source: Source, piece_values: int = PIECE_VALUES) -> None:
        super().__init__(conversion, source, piece_values)
        self._mean: tuple[tuple[object, ...], Tensor] | None = None
        self._dtype = conversion.state_dtype.torch

    def pieces(self, task: Task, box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, state by state, each in row-major order.

        The first pass makes the masters and rounds the model's own weights from them; without an optimizer it makes
        only the model's weights.
        """
        kind, optimizer = task.kind, self._conversion.optimizer
        masters_key = optimizer_key("param", kind.key)
        own = self._conversion.weight_dtype_of(kind.key).torch
        for part in self.cut(kind, box):
            values = self._weights(task, part)
            yield self._tensor_piece(task, kind.key, part, values.to(own))
            if optimizer:
                yield self._tensor_piece(task, masters_key, part, values)
        self._forget(task, box, "param" if self._conversion.has_optimizer else None)
        for state, power in _MOMENTS if optimizer else ():
            for part in self.cut(kind, box):
                values = self._moment(task, part, state, power)
                yield self._tensor_piece(task, optimizer_key(state, kind.key), part, values)
            self._forget(task, box, state)

    def _tensor_piece(self, task: Task, key: str, box: Box, values: Tensor) -> Piece:
        return self._piece(task, key, box, raw_of(values), DType.of(values.dtype))

    def _weights(self, task: Task, box: Box) -> Tensor:
        """The masters of a box, or the model's own weights if the target gets no optimizer state."""
        match task.recipe:
            case Recipe.COPY:
                own = self._conversion.weight_dtype_of(task.kind.key)
                made = self._conversion.state_dtype if self._conversion.optimizer else own
                return tensor_of(self._copy_values(task, box), made)
            case Recipe.GROW:
                return self._grow(task, box)
            case Recipe.FRESH:
                return self._fresh(task, box)
            case Recipe.ZERO:
                return torch.zeros(sizes(box), dtype=self._dtype)

    def _grow(self, task: Task, box: Box) -> Tensor:
        assert task.origin is not None
        kind, step, name = task.kind, self._step, task.kind.address(task.layer)
        key = self._conversion.weights_key(task.origin)
        values, above, dims = self._gather(task, key, box, self._dtype)
        grown = grow_values(
            values,
            dims,
            std=kind.std(step.large),
            constant=kind.constant,
            name=name,
            seed=step.seed,
            noise=step.noise,
            above=above,
            shrink=step.shrink,
            region=_region(task, step, box),
        )
        if kind.dims[0] is dimensions.ROUTER_ROWS and step.experts is not None and step.experts.noise:
            roughen(grown, step.experts.expert.new, step.experts.noise, name, step.seed)
        return grown

    def _moment(self, task: Task, box: Box, state: str, power: int) -> Tensor:
        origin, step = task.origin, self._step
        if (
            origin is None
            or step.moments is Moments.RESET
            or (task.new and not _new_layer_has_moments(task.kind, step))
        ):
            return torch.zeros(sizes(box), dtype=self._dtype)
        values, above, dims = self._gather(task, optimizer_key(state, origin.key), box, self._dtype, center=False)
        return grow_moment(values, dims, power=power, policy=step.moments, above=above)

    def _fresh(self, task: Task, box: Box) -> Tensor:
        """Initial values; several experts may share a row of a fresh router."""
        kind, step = task.kind, self._step
        fresh = initial_part(
            _region(task, step, box),
            sizes(box),
            self._dtype,
            std=kind.std(step.large),
            constant=kind.constant,
            name=kind.address(task.layer),
            seed=step.seed,
        )
        if kind.dims[0] is dimensions.ROUTER_ROWS and step.experts is not None and step.experts.fresh_rows is not None:
            return fresh[torch.from_numpy(step.experts.fresh_rows)]
        return fresh

    def _gather(
        self, task: Task, key: str, box: Box, dtype: torch.dtype, *, center: bool = True
    ) -> tuple[Tensor, Tensor | None, tuple[DimMap, ...]]:
        """Read the rows that a box needs, and the next layer's rows if a map takes entries from that layer.

        Returns:
            The rows, the next layer's rows or None, and the maps that remain to be applied.
        """
        dims = self._maps(task.kind)
        parts = [dim.part(start, stop) for dim, (start, stop) in zip(dims, box, strict=True)]
        rows, above = row_axis(task.kind), None
        if task.source_layer is not None and any(dim.above.any() for dim in parts):
            top = self._source.tensors[key].shape[0] - 1
            higher = replace(task, source_layer=min(task.source_layer + 1, top))
            above = self._read(higher, key, parts, dtype, center)
        values = self._read(task, key, parts, dtype, center)
        done = [part.gathered() if axis <= rows else part for axis, part in enumerate(parts)]
        return values, above, tuple(done if center else [replace(dim, center=False) for dim in done])

    def _read(self, task: Task, key: str, parts: list[DimMap], dtype: torch.dtype, center: bool) -> Tensor:
        """The wanted rows of a task's source, cast to a type, and centered if their map requires it."""
        values = tensor_of(self._gathered(task, key, parts), self._source.tensors[key].dtype).to(dtype)
        rows = parts[row_axis(task.kind)]
        if center and rows.center:
            prefix, _, tail = self._wanted(task, parts)
            values = values - self._mean_row(key, prefix, rows.size, tail)
        return values

    def _mean_row(self, key: str, prefix: Box, rows: int, tail: Box) -> Tensor:
        """The mean over all rows, summed in steps whose size depends on the tensor alone."""
        name = (key, prefix, tail)
        if self._mean is None or self._mean[0] != name:
            total = torch.zeros(sizes(tail), dtype=torch.float64)
            at_once = max(1, _MEAN_VALUES // max(1, volume(tail)))
            for start in range(0, rows, at_once):
                raw = self._rows(key, prefix, start, min(at_once, rows - start), tail)
                values = tensor_of(raw, self._source.tensors[key].dtype).to(self._dtype)
                total += values.sum(dim=0, dtype=torch.float64)
            self._mean = (name, (total / rows).to(self._dtype))
        return self._mean[1]


def _region(task: Task, step: GrowthStep, box: Box) -> TensorRegion:
    return TensorRegion(task.kind.layer_shape(step.large), tuple(start for start, _ in box))


def _new_layer_has_moments(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a tensor of a new layer inherits its source's moments.

    The inside of a silent layer has no gradient until the layer starts to contribute, so there `exact` means zero, as
    it does for fresh weights. The gradient of a copy that is not silent cannot be predicted; it inherits the moments.
    """
    if step.layers.inside is Inside.FRESH:
        return False
    if step.layers.silence is not Silence.NOTHING:
        return step.moments is Moments.COPY and not is_silenced(kind, step)
    return step.moments in (Moments.EXACT, Moments.COPY)
