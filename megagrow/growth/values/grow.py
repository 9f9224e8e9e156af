"""Apply the maps: one tensor of one layer at a time, weights and moments alike.

A tensor grows dimension by dimension, W'[.., j, ..] = scale(j) * W[.., source(j), ..]; what has no source is filled.
Moments go by the dual scale (`DimMap.gradient`), the first with the scale and the second with its square.
Works in the dtype that it is given (float32 in the converter, float64 in proofs).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagrow.growth.maps import NO_SOURCE, DimMap, Flags, Indices, Moments, Scales, consecutive_runs
from megagrow.growth.values.random import key, normal, workspace

_MAX_RUNS = 64
"""A dimension whose map has more runs is gathered index by index."""
_AT_ONCE = 1 << 15
"""Random values made at once: they and what they are made of stay in the processor's cache."""


@dataclass(frozen=True)
class TensorRegion:
    """Where a part lies in its whole tensor: random entries are addressed by their index there.

    Attributes:
        shape: of the whole.
        corner: of the part's first entry.
    """

    shape: tuple[int, ...]
    corner: tuple[int, ...]


def grow_values(
    source: Tensor,
    dims: Sequence[DimMap],
    *,
    std: float,
    constant: float,
    name: str,
    seed: int,
    noise: float = 0.0,
    above: Tensor | None = None,
    shrink: float | None = None,
    place: TensorRegion | None = None,
) -> Tensor:
    """Grow the values of one tensor, or of a part of it.

    Args:
        source: weights, one dimension a map.
        dims: the map of each dimension.
        std: of random entries; 0: they are `constant`.
        constant: value of entries without a source that are not random (1 in a gain, else 0).
        name: canonical name of the target tensor, layer included: the address of its random parts.
        seed: of all random parts.
        noise: relative noise on new copies.
        above: the same tensor of the next layer, where a map takes entries from it.
        shrink: factor on the values, a fresh initialization being added; None: neither.
        place: of the part, where it is not the whole.

    Returns:
        The grown tensor, contiguous, in the dtype of `source`; `source` itself where nothing changes.
    """
    for axis, dim in enumerate(dims):
        if dim.center:
            source = source - source.mean(dim=axis, keepdim=True)
    grown = _gather_layers(source, above, dims, [dim.scale for dim in dims])
    place = place or TensorRegion(tuple(grown.shape), (0,) * grown.dim())
    every = [np.arange(len(dim)) for dim in dims]
    missing = [dim.source == NO_SOURCE for dim in dims]
    if shrink is not None and std:
        fresh = torch.empty_like(grown)
        _set_normal(fresh, every, std, name, seed, place)
        for where in _any(every, missing):
            grown.numpy()[_index(where)] = 0.0
        return fresh.add_(grown * shrink)  # never fused: what an entry gets must not depend on how a tensor is cut
    for where in _any(every, missing):
        grown.numpy()[_index(where)] = constant
    if std:
        loud = [np.flatnonzero((dim.source != NO_SOURCE) | dim.random) for dim in dims]
        for where in _any(loud, missing):
            _set_normal(grown, where, std, name, seed, place)
    if noise:
        present = [np.flatnonzero(~flags) for flags in missing]
        factor = torch.zeros_like(grown)
        for where in _any(present, [dim.new for dim in dims]):
            _set_normal(factor, where, noise, name + "/noise", seed, place)
        grown = grown + factor.mul_(grown)
    return grown


def grow_moment(
    source: Tensor, dims: Sequence[DimMap], *, power: int, policy: Moments, above: Tensor | None = None
) -> Tensor:
    """Grow one of Adam's moments.

    Args:
        source: exp_avg (power 1) or exp_avg_sq (power 2).
        dims: the maps that the weights grow by.
        power: the power of a gradient that the moment is an average of.
        policy: what becomes of it.
        above: the same moment of the next layer, where a map takes entries from it.

    Returns:
        The grown moment; entries without a source are zero.
    """
    if policy is Moments.RESET:
        return source.new_zeros([len(dim) for dim in dims])
    plain = policy is Moments.COPY
    scales = [np.ones(len(dim)) if plain else dim.gradient**power for dim in dims]
    grown = _gather_layers(source, above, dims, scales)
    dropped = [dim.new if policy is Moments.ASYMMETRIC else dim.source == NO_SOURCE for dim in dims]
    for axis, flags in enumerate(dropped):
        if flags.any():
            grown = grown.clone() if grown is source else grown
            for start, stop in _ranges(flags):
                grown.narrow(axis, start, stop - start).zero_()
    return grown


def initial_values(
    index: NDArray[np.uint64], *, std: float, constant: float, name: str, seed: int
) -> NDArray[np.float64]:
    """Values of a fresh tensor at flat indices of its global shape: normal with `std`, or `constant` where it is 0."""
    if not std:
        return np.full(index.shape, constant)
    return std * normal(key(seed, name), index)


def initial_part(
    place: TensorRegion,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    *,
    std: float,
    constant: float,
    name: str,
    seed: int,
) -> Tensor:
    """A part of a fresh tensor: `initial_values` of its box, in little more memory than it takes itself."""
    values = torch.full(lengths, constant, dtype=dtype)
    if std:
        _set_normal(values, [np.arange(length) for length in lengths], std, name, seed, place)
    return values


def roughen(rows_EH: Tensor, new: Flags, noise: float, name: str, seed: int) -> None:
    """Add normal noise to the router's new rows, in place: `noise` times the deviation of all its entries."""
    index = np.arange(rows_EH.numel(), dtype=np.uint64).reshape(tuple(rows_EH.shape))
    values = torch.from_numpy(normal(key(seed, name + "/noise"), index)).to(rows_EH.dtype)
    flags = torch.from_numpy(new)
    rows_EH[flags] += noise * rows_EH.std() * values[flags]


def _gather_layers(source: Tensor, above: Tensor | None, dims: Sequence[DimMap], scales: Sequence[Scales]) -> Tensor:
    """Gather from a layer's tensor, and from the next layer's where a map says so."""
    grown = _gather(source, dims, scales)
    if above is not None:
        taken = torch.zeros(grown.shape, dtype=torch.bool)
        for where in _any([np.arange(len(dim)) for dim in dims], [dim.above for dim in dims]):
            taken.numpy()[_index(where)] = True
        grown = torch.where(taken, _gather(above, dims, scales), grown)
    return grown


def _gather(source: Tensor, dims: Sequence[DimMap], scales: Sequence[Scales]) -> Tensor:
    """Gather and scale; the source itself where there is nothing to do. Entries without a source hold anything."""
    grown = source
    for axis, (dim, scale) in enumerate(zip(dims, scales, strict=True)):
        if source.shape[axis] != dim.size:
            raise AssertionError(f"dimension {axis} has {source.shape[axis]} entries, its map expects {dim.size}")
        if len(dim) != dim.size or (dim.source != np.arange(dim.size)).any():
            grown = _take(grown, axis, dim)
        if (scale != 1.0).any():
            shape = [-1 if other == axis else 1 for other in range(source.dim())]
            factor = torch.from_numpy(scale).to(source.dtype).view(shape)
            grown = grown * factor if grown is source else grown.mul_(factor)
    if grown is source and any((dim.source == NO_SOURCE).any() for dim in dims):
        return source.clone()
    return grown.contiguous()


def _take(source: Tensor, axis: int, dim: DimMap) -> Tensor:
    """Gather along one dimension: run by run where there are few, since copies of runs are plain."""
    pieces = consecutive_runs(dim.source)
    if len(pieces) > _MAX_RUNS:
        return source.index_select(axis, torch.from_numpy(np.maximum(dim.source, 0)))
    lengths = list(source.shape)
    lengths[axis] = len(dim)
    grown = source.new_empty(lengths)
    for target, begin, length in pieces:
        grown.narrow(axis, target, length).copy_(source.narrow(axis, begin, length))
    return grown


def _ranges(flags: Flags) -> Iterator[tuple[int, int]]:
    """Start and stop of the ranges of flagged entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    yield from ((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def _any(inside: Sequence[Indices], flags: Sequence[Flags]) -> Iterator[list[Indices]]:
    """Entries within `inside` that are flagged in at least one dimension, as disjoint grids of indices."""
    for axis, flagged in enumerate(flags):
        if not flagged.any():
            continue
        grid = [own[~before[own]] for own, before in zip(inside[:axis], flags[:axis], strict=True)]
        grid += [inside[axis][flagged[inside[axis]]], *inside[axis + 1 :]]
        if all(len(own) for own in grid):
            yield grid


def _index(grid: Sequence[Indices]) -> tuple[Any, ...]:
    """What numpy takes for a grid: slices where they do, which is much faster."""
    if all(own[-1] - own[0] + 1 == len(own) for own in grid):
        return tuple(slice(int(own[0]), int(own[-1]) + 1) for own in grid)
    return np.ix_(*grid)


def _set_normal(target: Tensor, grid: Sequence[Indices], std: float, name: str, seed: int, place: TensorRegion) -> None:
    """Set a grid of entries of `target` to normal variates addressed by their flat index in the whole tensor."""
    strides = [math.prod(place.shape[axis + 1 :]) for axis in range(len(grid))]
    address = [
        (own + corner).astype(np.uint64) * np.uint64(stride)
        for own, corner, stride in zip(grid, place.corner, strides, strict=True)
    ]
    inner = math.prod(len(own) for own in grid[1:])
    at_once = max(1, _AT_ONCE // inner)
    stream, view, work = key(seed, name), target.numpy(), workspace(at_once * inner)
    for start in range(0, len(grid[0]), at_once):
        index = address[0][start : start + at_once]
        for further in address[1:]:
            index = index[..., None] + further
        values = normal(stream, index, work)
        values *= std
        view[_index([grid[0][start : start + at_once], *grid[1:]])] = values
