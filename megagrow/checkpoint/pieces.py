"""Make any box of a grown tensor from the parts of the source that it needs.

A piece is made in three steps: rows are gathered while they are read (so a row that is not wanted is never read, and
the source is never whole in memory), columns are gathered in memory, and what has no source is filled by address.
Whatever the cut, the values are the same bits: random entries go by their index in the whole tensor, and sums (the
mean that LayerNorm's padding takes out) are taken over the source in steps that do not depend on the cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint import fused
from megagrow.checkpoint.names import TensorKind, optimizer_key
from megagrow.checkpoint.store import Box, Source, sizes, volume, whole
from megagrow.growth.axes import NO_SOURCE, DimMap, Indices, runs
from megagrow.growth.layers import Inside, Silence
from megagrow.growth.step import GrowthStep, Moments
from megagrow.growth.tensors import Place, grow_moment, grow_values, initial_part, roughen

if TYPE_CHECKING:
    from megagrow.checkpoint.convert import Conversion, Task

PIECE_VALUES = 2 << 20
"""Values of a piece where memory allows: 8 MiB in float32."""
_MOMENTS = (("exp_avg", 1), ("exp_avg_sq", 2))
_MEAN_VALUES = 1 << 18


@dataclass(frozen=True)
class Piece:
    """A box of a target tensor.

    Attributes:
        key: of the target tensor.
        corner: of the box's first entry in the global tensor.
        values: contiguous; of per-layer tensors with the layer dimension in front.
    """

    key: str
    corner: tuple[int, ...]
    values: Tensor


class Grower:
    """Makes pieces of a conversion's tasks."""

    def __init__(self, conversion: "Conversion", source: Source, piece_values: int = PIECE_VALUES) -> None:
        self._conversion = conversion
        self._step = conversion.step
        self._source = source
        self._limit = piece_values
        self._dims: dict[str, tuple[DimMap, ...]] = {}
        self._mean: tuple[tuple[object, ...], Tensor] | None = None
        self._dtype = conversion.state_dtype
        self._copied: dict[TensorKind, bool] = {}

    def pieces(self, task: "Task", box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, state by state, each in row-major order.

        The first pass makes the masters and, of them, the model's own weights; without an optimizer only these.
        """
        kind, optimizer = task.kind, self._conversion.optimizer
        weights_key = optimizer_key("param", kind.key)
        for part in self.cut(kind, box):
            values = self._weights(task, part)
            yield self._piece(task, kind.key, part, values.to(self._conversion.weight_dtype))
            if optimizer:
                yield self._piece(task, weights_key, part, values)
        self._forget(task, "param" if self._conversion.has_optimizer else None)
        for state, power in _MOMENTS if optimizer else ():
            for part in self.cut(kind, box):
                yield self._piece(task, optimizer_key(state, kind.key), part, self._moment(task, part, state, power))
            self._forget(task, state)

    def cut(self, kind: TensorKind, box: Box) -> Iterator[Box]:
        """Cut a box into pieces of whole rows, expert by expert, in row-major order.

        A router stays whole: noise on its rows is relative to the deviation of all.
        """
        if kind.dims[0] is fused.ROUTER_ROWS:
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

    def _piece(self, task: "Task", key: str, box: Box, values: Tensor) -> Piece:
        corner = tuple(start for start, _ in box)
        if task.layer is None:
            return Piece(key, corner, values)
        return Piece(key, (task.layer, *corner), values.unsqueeze(0))

    def _weights(self, task: "Task", box: Box) -> Tensor:
        kind, step, origin = task.kind, self._step, task.origin
        name, std = kind.address(task.layer), kind.std(step.large)
        if task.new and _silenced(kind, step):
            return torch.zeros(sizes(box), dtype=self._dtype)
        if origin is None or (task.new and step.layers.inside is Inside.FRESH):
            return self._fresh(task, box)
        key = optimizer_key("param", origin.key) if self._conversion.has_optimizer else origin.key
        if self._is_copied(kind, key):
            values, _, dims = self._gather(task, key, box, self._conversion.weight_dtype)
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
        if kind.dims[0] is fused.ROUTER_ROWS and step.experts is not None and step.experts.noise:
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
            changes = any(dim.center or dim.above.any() or (dim.scale != 1.0).any() for dim in maps)
            adds = self._step.shrink is not None or kind.dims[0] is fused.ROUTER_ROWS
            self._copied[kind] = not (changes or adds or any((dim.source == NO_SOURCE).any() for dim in maps))
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
        if kind.dims[0] is fused.ROUTER_ROWS and step.experts is not None and step.experts.fresh_rows is not None:
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
            above = self._read(higher, key, parts, rows, dtype, center)
        values = self._read(task, key, parts, rows, dtype, center)
        done = [part.gathered() if axis <= rows else part for axis, part in enumerate(parts)]
        return values, above, tuple(done if center else [replace(dim, center=False) for dim in done])

    def _read(self, task: "Task", key: str, parts: list[DimMap], rows: int, dtype: torch.dtype, center: bool) -> Tensor:
        """The wanted rows of a task's source (of one expert's, where there are experts), in the target's order."""
        prefix: Box = () if task.source_layer is None else ((task.source_layer, task.source_layer + 1),)
        wanted, tail = parts[rows].source, whole(tuple(part.size for part in parts[rows + 1 :]))
        if rows and task.origin is not None and task.origin.per_expert:
            expert = int(parts[0].source[0])
            prefix = (*prefix, (expert, expert + 1))
        elif rows:
            wanted, tail = self._slice_of_dense(task, int(parts[0].source[0]), wanted, tail)
        found = runs(wanted)
        if len(found) == 1 and found[0][2] == len(wanted):
            _, begin, length = found[0]
            values = self._rows(key, prefix, begin, length, tail, dtype)
        else:
            values = torch.empty((len(wanted), *sizes(tail)), dtype=dtype)
            for target, begin, length in found:
                values[target : target + length] = self._rows(key, prefix, begin, length, tail, dtype)
        if center and parts[rows].center:
            values = values - self._mean_row(key, prefix, parts[rows].size, tail)
        return values.unsqueeze(0) if rows else values

    def _rows(self, key: str, prefix: Box, begin: int, length: int, tail: Box, dtype: torch.dtype) -> Tensor:
        values = self._source.read(key, (*prefix, (begin, begin + length), *tail))
        return values.view((length, *sizes(tail))).to(dtype)

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

    def _mean_row(self, key: str, prefix: Box, rows: int, tail: Box) -> Tensor:
        """The mean over all rows, in steps whose size depends on nothing but the tensor."""
        name = (key, prefix, tail)
        if self._mean is None or self._mean[0] != name:
            total = torch.zeros(sizes(tail), dtype=torch.float64)
            at_once = max(1, _MEAN_VALUES // max(1, volume(tail)))
            for begin in range(0, rows, at_once):
                length = min(at_once, rows - begin)
                total += self._rows(key, prefix, begin, length, tail, self._dtype).sum(dim=0, dtype=torch.float64)
            self._mean = (name, (total / rows).to(self._dtype))
        return self._mean[1]

    def _maps(self, kind: TensorKind) -> tuple[DimMap, ...]:
        """The maps of a kind's dimensions: the same for every layer."""
        if kind.key not in self._dims:
            self._dims[kind.key] = tuple(dim.grow(self._step) for dim in kind.dims)
        return self._dims[kind.key]

    def _forget(self, task: "Task", state: str | None) -> None:
        """Let the kernel drop what no later task reads."""
        if task.origin is None or not task.last:
            return
        key = task.origin.key if state is None else optimizer_key(state, task.origin.key)
        box = whole(self._source.tensors[key].shape)
        if task.source_layer is not None:
            box = ((task.source_layer, task.source_layer + 1), *box[1:])
        self._source.forget(key, box)


def _place(task: "Task", step: GrowthStep, box: Box) -> Place:
    return Place(task.kind.layer_shape(step.large), tuple(start for start, _ in box))


def _silenced(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a tensor is zero in new layers, so that they pass their input on."""
    if step.layers.silence is Silence.WRITERS:
        return kind.residual_writer
    if step.layers.silence is Silence.NORMS:
        gated = step.large.swiglu or step.experts is not None
        return kind.silences_gated if gated else kind.silences
    return False


def _new_layer_has_moments(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a new layer's tensor takes over its source's moments.

    The inside of a silent layer has no gradient before it has come alive, so there `exact` means zero; so it does for
    fresh weights. Copies that are not silent have no exact gradient to predict: they take their source's.
    """
    if step.layers.inside is Inside.FRESH:
        return False
    if step.layers.silence is not Silence.NOTHING:
        return step.moments is Moments.COPY and not _silenced(kind, step)
    return step.moments in (Moments.EXACT, Moments.COPY)
