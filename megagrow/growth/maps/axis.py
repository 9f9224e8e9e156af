"""Axis maps: the one data structure of growth.

An axis (hidden, ffn, head, ...) of size n becomes one of size N. Target coordinate j copies source coordinate
`source[j]` (or none), and carries `share[j]` of what its source did: the shares of all copies of a coordinate
add up to 1, which is what preserves the function. A coordinate takes part in a tensor in a *role*; its entries
there are scaled by `scale[role][j]`.

Gradients follow by duality: the roles' scales along one path multiply to the share, so an entry's gradient in
the grown model is the source's times share / own scale. That one rule moves Adam's moments (`tensors`).
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
    """What a tensor dimension does with the coordinates of its axis."""

    WRITE = "write"
    """Produces them: embedding columns, rows of linear_proj and linear_fc2 on hidden."""
    READ = "read"
    """Consumes them: columns of linear_qkv and linear_fc1 on hidden."""
    GAIN = "gain"
    """Multiplies them: norm weights."""
    OFFSET = "offset"
    """Is added after the gain: norm biases."""
    FINAL_GAIN = "final_gain"
    """The gain that the output layer reads; differs from GAIN where that layer is tied to the embedding."""
    FINAL_OFFSET = "final_offset"
    """The offset that the output layer reads."""
    FIXED = "fixed"
    """None: the axis does not grow (vocabulary, positions, head_dim)."""


class Fill(Enum):
    """What an entry without a source gets; a gain without a source is one."""

    ZERO = "zero"
    RANDOM = "random"


@dataclass(frozen=True, eq=False)
class DimMap:
    """How one tensor dimension grows: N target entries from n source entries.

    Attributes:
        size: n, entries of the source dimension.
        source: [N] index of the source entry, or NO_SOURCE.
        new: [N] whether training should take the entry for a new one.
        scale: [N] factor on the source's values.
        gradient: [N] factor on the source's gradients (the dual of `scale`).
        random: [N] whether an entry without a source is random (else zero, or one in a gain).
        above: [N] whether the source entry is that of the next layer (AKI), not of the same one.
        center: subtract the source's mean over this dimension first (LayerNorm's shift invariance).
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

    @property
    def trivial(self) -> bool:
        """Whether the dimension stays as it is."""
        return (
            not self.center
            and self.size == len(self)
            and bool((self.source == np.arange(self.size)).all() and (self.scale == 1.0).all())
        )

    @staticmethod
    def unchanged(size: int) -> "DimMap":
        """The map of a dimension that does not grow."""
        ones, no = np.ones(size), np.zeros(size, dtype=bool)
        return DimMap(size=size, source=np.arange(size), new=no, scale=ones, gradient=ones, random=no, above=no)

    def at(self, entries: "slice | Indices", source: Indices, size: int) -> "DimMap":
        """Some entries of this map, with their sources renamed in a dimension of `size` entries."""
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
        """The map of some consecutive target entries, from the same source entries."""
        if start == 0 and stop == len(self):
            return self
        return replace(self.at(slice(start, stop), self.source[start:stop], self.size), center=self.center)

    def gathered(self) -> "DimMap":
        """This map for a source whose entries lie in the order of the target already, centered where that is due."""
        source = np.where(self.source == NO_SOURCE, NO_SOURCE, np.arange(len(self)))
        return replace(self, size=len(self), source=source, center=False)

    @staticmethod
    def concatenate(parts: "Sequence[DimMap]") -> "DimMap":
        """Join maps whose sources count in one and the same dimension."""
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
        """Map of a dimension in which each entry of this one is a block of `width` consecutive entries."""
        entries = np.repeat(np.arange(len(self)), width)
        inside = np.tile(np.arange(width), len(self))
        return self.at(entries, self.source[entries] * width + inside, self.size * width)


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How an axis grows, for every role that a tensor can have on it.

    Attributes:
        size: n, coordinates of the source.
        source: [N] index of the source coordinate, or NO_SOURCE.
        new: [N] whether the coordinate counts as new (a copy beyond the first, or without a source).
        share: [N] part of its source's effect that a copy carries.
        scale: factor on values by role, each [N]; a role that is missing has scale 1.
        fill: what a coordinate without a source gets, by role; a role that is missing gets zeros.
        above: [N] whether what writes the coordinate comes from the next layer; none by default.
        shrink: all values are scaled by this and a fresh initialization is added; None: they are not.
        center: writers lose their mean over the axis first.
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
        assert (scale != 0.0).all(), f"{role.value}: a scale of 0 has no dual; fill with zeros instead"
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
        no = np.zeros(size, dtype=bool)
        return AxisMap(size=size, source=np.arange(size), new=no, share=np.ones(size), scale={}, fill={})


def consecutive_runs(source: Indices) -> list[tuple[int, int, int]]:
    """(target, source, length) of the longest runs of target entries with consecutive sources, in order."""
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
    """[N] how many target coordinates share each one's source; 1 where there is no source."""
    counts = np.bincount(source[source != NO_SOURCE], minlength=1)
    return np.where(source == NO_SOURCE, 1, counts[np.maximum(source, 0)]).astype(np.float64)


def shares(source: Indices, new: Flags, of_new: float | None) -> Scales:
    """[N] shares of copies of one source: even, or `of_new` for all new copies together and the rest for the old one.

    Uneven shares are as exact as even ones, and copies with unequal shares get unequal updates: they come apart.
    """
    copies = multiplicity(source)
    if of_new is None:
        return 1.0 / copies
    single = copies == 1
    uneven = np.where(new, of_new / np.maximum(copies - 1, 1), 1.0 - of_new)
    return np.where(single, 1.0, uneven)


def cyclic_copies(size: int, target: int) -> tuple[Indices, Flags]:
    """Source and newness of `target` coordinates that copy `size` ones in turn, the originals first."""
    index = np.arange(target)
    return index % size, index >= size


def padded(size: int, target: int) -> tuple[Indices, Flags]:
    """Source and newness of `target` coordinates of which the first `size` are old and the rest have no source."""
    index = np.arange(target)
    return np.where(index < size, index, NO_SOURCE), index >= size
