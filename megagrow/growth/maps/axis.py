"""Axis maps: the data structure that all growth is expressed in.

An axis (hidden, ffn, head, ...) of size n becomes one of size N. Target coordinate j copies source coordinate
`source[j]`, or none, and carries `share[j]` of its effect. The shares of all copies of a coordinate add up to 1,
which preserves the function. A coordinate has a *role* in each tensor, and its entries there are scaled by
`scale[role][j]`.

Gradients follow by duality: the scales of the roles along one path multiply to the share, so the gradient of an
entry in the grown model is its source's times share / own scale. Adam's moments grow by this rule
(`values.grow.grow_moment`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]
Scales = NDArray[np.float64]
NO_SOURCE = -1


class Role(Enum):
    """What a tensor does with the coordinates of an axis along one of its dimensions."""

    WRITE = "write"
    """Produces the coordinates. On hidden: columns of the embedding, rows of linear_proj and linear_fc2."""
    READ = "read"
    """Consumes the coordinates. On hidden: columns of linear_qkv and linear_fc1."""
    GAIN = "gain"
    """Multiplies the coordinates: norm weights."""
    OFFSET = "offset"
    """Added after the gain: norm biases."""
    FINAL_GAIN = "final_gain"
    """Gain in front of the output layer. Differs from GAIN if that layer is tied to the embedding."""
    FINAL_OFFSET = "final_offset"
    """Offset in front of the output layer."""
    FIXED = "fixed"
    """No role: the dimension does not grow (positions, head_dim)."""


class Fill(Enum):
    """Value of an entry without a source. (A gain without a source is 1.)"""

    ZERO = "zero"
    RANDOM = "random"


@dataclass(frozen=True, eq=False)
class DimMap:
    """How one tensor dimension grows: N target entries from n source entries.

    Attributes:
        size: n, entries of the source dimension.
        source: [N] index of the source entry, or NO_SOURCE.
        new: [N] whether the entry counts as new.
        scale: [N] factor on the source's values.
        gradient: [N] factor on the source's gradients (the dual of `scale`).
        random: [N] whether an entry without a source is random (otherwise 0, or 1 in a gain).
        above: [N] whether the source entry is taken from the next layer (AKI) instead of the same one.
        center: subtract the source's mean over this dimension first (LayerNorm is invariant to shifts).
    """

    size: int
    source: Indices
    new: Flags
    scale: Scales
    gradient: Scales
    random: Flags
    above: Flags
    center: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def at(self, entries: "slice | Indices", source: Indices, size: int) -> "DimMap":
        """Some entries of this map, with new indices of their sources, in a source dimension of `size` entries."""
        return DimMap(
            size=size,
            source=np.where(self.source[entries] == NO_SOURCE, NO_SOURCE, source),
            new=self.new[entries],
            scale=self.scale[entries],
            gradient=self.gradient[entries],
            random=self.random[entries],
            above=self.above[entries],
        )

    def part(self, start: int, stop: int) -> "DimMap":
        """The map of a range of target entries, with the same source dimension."""
        if start == 0 and stop == len(self):
            return self
        return replace(self.at(slice(start, stop), self.source[start:stop], self.size), center=self.center)

    def gathered(self) -> "DimMap":
        """This map for a source that is already gathered in target order and, if the map centers, centered."""
        source = np.where(self.source == NO_SOURCE, NO_SOURCE, np.arange(len(self)))
        return replace(self, size=len(self), source=source, center=False)

    @staticmethod
    def concatenate(parts: "Sequence[DimMap]") -> "DimMap":
        """Join maps that share one source dimension."""
        return DimMap(
            size=parts[0].size,
            source=np.concatenate([part.source for part in parts]),
            new=np.concatenate([part.new for part in parts]),
            scale=np.concatenate([part.scale for part in parts]),
            gradient=np.concatenate([part.gradient for part in parts]),
            random=np.concatenate([part.random for part in parts]),
            above=np.concatenate([part.above for part in parts]),
        )

    def spread(self, width: int) -> "DimMap":
        """The map of a dimension in which each entry of this one is a block of `width` consecutive entries."""
        entries = np.repeat(np.arange(len(self)), width)
        inside = np.tile(np.arange(width), len(self))
        return self.at(entries, self.source[entries] * width + inside, self.size * width)


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How an axis grows, for every role of a tensor on it.

    Attributes:
        size: n, source coordinates.
        source: [N] index of the source coordinate, or NO_SOURCE.
        new: [N] whether the coordinate is new: a copy beyond the first, or without a source.
        share: [N] share of its source's effect that a copy carries.
        scale: factor on values by role, each [N]; missing roles have scale 1.
        fill: values of coordinates without a source, by role; missing roles get zeros.
        above: [N] whether the writers of a coordinate are taken from the next layer; None: no coordinate's are.
        shrink: factor on all values before a fresh initialization is added; None: neither.
        center: subtract the mean over the axis from writers first.
    """

    size: int
    source: Indices
    new: Flags
    share: Scales
    scale: Mapping[Role, Scales]
    fill: Mapping[Role, Fill]
    above: Flags | None = None
    shrink: float | None = None
    center: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def dim(self, role: Role) -> DimMap:
        """The map of a tensor dimension that has `role` on this axis."""
        scale = self.scale.get(role, np.ones(len(self)))
        assert (scale != 0.0).all(), (
            f"{role.value}: a scale of 0 has no dual; leave the coordinate without a source and fill it with zeros"
        )
        return DimMap(
            size=self.size,
            source=self.source,
            new=self.new,
            scale=scale,
            gradient=self.share / scale,
            random=np.full(len(self), self.fill.get(role, Fill.ZERO) is Fill.RANDOM),
            above=self.above if self.above is not None and role is Role.WRITE else np.zeros(len(self), dtype=bool),
            center=self.center and role is Role.WRITE,
        )

    @staticmethod
    def unchanged(size: int) -> "AxisMap":
        """The map of an axis that does not grow."""
        none = np.zeros(size, dtype=bool)
        return AxisMap(size=size, source=np.arange(size), new=none, share=np.ones(size), scale={}, fill={})


def consecutive_runs(source: Indices) -> list[tuple[int, int, int]]:
    """(target, source, length) of each maximal run of target entries with consecutive sources, in order."""
    if not len(source):
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (source[1:] == NO_SOURCE) | (source[:-1] == NO_SOURCE)) + 1
    starts = np.concatenate([[0], breaks])
    lengths = np.diff(np.concatenate([starts, [len(source)]]))
    return [
        (int(start), int(source[start]), int(length))
        for start, length in zip(starts, lengths, strict=True)
        if source[start] != NO_SOURCE
    ]


def multiplicity(source: Indices) -> Scales:
    """[N] number of target coordinates with the same source as each one; 1 for one without a source."""
    counts = np.bincount(source[source != NO_SOURCE], minlength=1)
    return np.where(source == NO_SOURCE, 1, counts[np.maximum(source, 0)]).astype(np.float64)


def shares(source: Indices, new: Flags, of_new: float | None) -> Scales:
    """[N] share of each copy: even, or `of_new` for all new copies of a source together and the rest for the old one.

    Uneven shares are as exact as even ones. Copies with unequal shares get unequal updates, so they diverge.
    """
    copies = multiplicity(source)
    if of_new is None:
        return 1.0 / copies
    single = copies == 1
    uneven = np.where(new, of_new / np.maximum(copies - 1, 1), 1.0 - of_new)
    return np.where(single, 1.0, uneven)


def cyclic_copies(size: int, target: int) -> tuple[Indices, Flags]:
    """`source` and `new` of `target` coordinates that copy `size` coordinates in turn, the originals first."""
    index = np.arange(target)
    return index % size, index >= size


def padded(size: int, target: int) -> tuple[Indices, Flags]:
    """`source` and `new` of `target` coordinates: the first `size` are the old ones, the rest have no source."""
    index = np.arange(target)
    return np.where(index < size, index, NO_SOURCE), index >= size
