"""Make any box of a grown tensor from the parts of the source that it needs.

A piece is made in three steps: rows are gathered while they are read (so a row that is not wanted is never read, and
the source is never whole in memory), columns are gathered in memory, and what has no source is filled by address.
Whatever the cut, the values are the same bits: random entries go by their index in the whole tensor, and sums (the
mean that LayerNorm's padding takes out) are taken over the source in steps that do not depend on the cut.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagrow.checkpoint.index import Box, DType, Source, raw_of, sizes, tensor_of, volume
from megagrow.checkpoint.tensors import TensorKind, dimensions, optimizer_key
from megagrow.convert.make.rows import PIECE_VALUES, Piece, Rows
from megagrow.convert.plan import is_plain, silenced
from megagrow.growth.maps import DimMap, GrowthStep, Inside, Moments, Silence
from megagrow.growth.values.grow import TensorRegion, grow_moment, grow_values, initial_part, roughen

if TYPE_CHECKING:
    from megagrow.convert.plan import ConversionPlan, Task
_MOMENTS = (("exp_avg", 1), ("exp_avg_sq", 2))
_MEAN_VALUES = 1 << 18


class Grower(Rows):
    """Makes pieces of a conversion's tasks, whatever becomes of their values."""

    def __init__(self, conversion: "ConversionPlan", source: Source, piece_values: int = PIECE_VALUES) -> None:
        super().__init__(conversion, source, piece_values)
        self._mean: tuple[tuple[object, ...], Tensor] | None = None
        self._dtype = conversion.state_dtype.torch
        self._weight_dtype = conversion.weight_dtype.torch
        self._copied: dict[TensorKind, bool] = {}

    def pieces(self, task: "Task", box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, state by state, each in row-major order.

        The first pass makes the masters and, of them, the model's own weights; without an optimizer only these.
        """
        kind, optimizer = task.kind, self._conversion.optimizer
        weights_key = optimizer_key("param", kind.key)
        for part in self.cut(kind, box):
            values = self._weights(task, part)
            yield self._grown(task, kind.key, part, values.to(self._weight_dtype))
            if optimizer:
                yield self._grown(task, weights_key, part, values)
        self._forget(task, box, "param" if self._conversion.has_optimizer else None)
        for state, power in _MOMENTS if optimizer else ():
            for part in self.cut(kind, box):
                yield self._grown(task, optimizer_key(state, kind.key), part, self._moment(task, part, state, power))
            self._forget(task, box, state)

    def _grown(self, task: "Task", key: str, box: Box, values: Tensor) -> Piece:
        return self._piece(task, key, box, raw_of(values), DType.of(values.dtype))

    def _weights(self, task: "Task", box: Box) -> Tensor:
        kind, step, origin = task.kind, self._step, task.origin
        name, std = kind.address(task.layer), kind.std(step.large)
        if task.new and silenced(kind, step):
            return torch.zeros(sizes(box), dtype=self._dtype)
        if origin is None or (task.new and step.layers.inside is Inside.FRESH):
            return self._fresh(task, box)
        key = optimizer_key("param", origin.key) if self._conversion.has_optimizer else origin.key
        if self._is_copied(kind, key):
            values, _, dims = self._gather(task, key, box, self._weight_dtype)
            return grow_values(values, dims, std=0.0, constant=0.0, name=name, seed=step.seed)
        values, above, dims = self._gather(task, key, box, self._dtype)
        grown = grow_values(
            values,
            dims,
            std=std,
            constant=kind.constant,
            name=name,
            seed=step.seed,
            noise=step.noise,
            above=above,
            shrink=step.shrink,
            place=_place(task, step, box),
        )
        if kind.dims[0] is dimensions.ROUTER_ROWS and step.experts is not None and step.experts.noise:
            roughen(grown, step.experts.expert.new, step.experts.noise, name, step.seed)
        return grown

    def _moment(self, task: "Task", box: Box, state: str, power: int) -> Tensor:
        origin, step = task.origin, self._step
        if (
            origin is None
            or step.moments is Moments.RESET
            or (task.new and not _new_layer_has_moments(task.kind, step))
        ):
            return torch.zeros(sizes(box), dtype=self._dtype)
        values, above, dims = self._gather(task, optimizer_key(state, origin.key), box, self._dtype, center=False)
        return grow_moment(values, dims, power=power, policy=step.moments, above=above)

    def _is_copied(self, kind: TensorKind, key: str) -> bool:
        """Whether all values of a kind are its source's own, of the target's type: then they need not pass through
        the type of masters.
        """
        wanted = self._conversion.weight_dtype
        if self._conversion.optimizer or self._source.tensors[key].dtype != wanted or self._step.noise:
            return False
        if kind not in self._copied:
            maps = self._maps(kind)
            adds = self._step.shrink is not None or kind.dims[0] is dimensions.ROUTER_ROWS
            self._copied[kind] = not adds and all(map(is_plain, maps))
        return self._copied[kind]

    def _fresh(self, task: "Task", box: Box) -> Tensor:
        """Initial values. What joins a copied layer is silent (a shared expert); experts may share router rows."""
        kind, step = task.kind, self._step
        if kind.residual_writer and not (task.new and step.layers.inside is Inside.FRESH):
            return torch.zeros(sizes(box), dtype=self._dtype)
        fresh = initial_part(
            _place(task, step, box),
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
        self, task: "Task", key: str, box: Box, dtype: torch.dtype, *, center: bool = True
    ) -> tuple[Tensor, Tensor | None, tuple[DimMap, ...]]:
        """Read the rows that a box needs; return them, the next layer's where a map takes entries from it, and the
        maps that are still to be applied.
        """
        dims = self._maps(task.kind)
        parts = [dim.part(start, stop) for dim, (start, stop) in zip(dims, box, strict=True)]
        rows = 1 if task.kind.per_expert else 0
        above = None
        if task.source_layer is not None and any(dim.above.any() for dim in parts):
            top = self._source.tensors[key].shape[0] - 1
            higher = replace(task, source_layer=min(task.source_layer + 1, top))
            above = self._read(higher, key, parts, dtype, center)
        values = self._read(task, key, parts, dtype, center)
        done = [part.gathered() if axis <= rows else part for axis, part in enumerate(parts)]
        return values, above, tuple(done if center else [replace(dim, center=False) for dim in done])

    def _read(self, task: "Task", key: str, parts: list[DimMap], dtype: torch.dtype, center: bool) -> Tensor:
        """The wanted rows of a task's source in a type, less their mean where the map says so."""
        values = tensor_of(self._gathered(task, key, parts), self._source.tensors[key].dtype).to(dtype)
        rows = parts[1 if task.kind.per_expert else 0]
        if center and rows.center:
            prefix, _, tail = self._wanted(task, parts)
            values = values - self._mean_row(key, prefix, rows.size, tail)
        return values

    def _mean_row(self, key: str, prefix: Box, rows: int, tail: Box) -> Tensor:
        """The mean over all rows, in steps whose size depends on nothing but the tensor."""
        name = (key, prefix, tail)
        if self._mean is None or self._mean[0] != name:
            total = torch.zeros(sizes(tail), dtype=torch.float64)
            at_once = max(1, _MEAN_VALUES // max(1, volume(tail)))
            for begin in range(0, rows, at_once):
                raw = self._rows(key, prefix, begin, min(at_once, rows - begin), tail)
                values = tensor_of(raw, self._source.tensors[key].dtype).to(self._dtype)
                total += values.sum(dim=0, dtype=torch.float64)
            self._mean = (name, (total / rows).to(self._dtype))
        return self._mean[1]


def _place(task: "Task", step: GrowthStep, box: Box) -> TensorRegion:
    return TensorRegion(task.kind.layer_shape(step.large), tuple(start for start, _ in box))


def _new_layer_has_moments(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a new layer's tensor takes over its source's moments.

    The inside of a silent layer has no gradient before it has come alive, so there `exact` means zero; so it does for
    fresh weights. Copies that are not silent have no exact gradient to predict: they take their source's.
    """
    if step.layers.inside is Inside.FRESH:
        return False
    if step.layers.silence is not Silence.NOTHING:
        return step.moments is Moments.COPY and not silenced(kind, step)
    return step.moments in (Moments.EXACT, Moments.COPY)
