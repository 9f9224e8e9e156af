"""Apply maps to tensors: weights and moments, one tensor of one layer at a time.

A tensor grows dimension by dimension, W'[.., j, ..] = scale(j) * W[.., source(j), ..]; entries without a source are
filled. Moments use the dual scale (`DimMap.gradient`): exp_avg the scale itself, exp_avg_sq its square.
All work is done in the dtype of the source (float32 in the converter, float64 in proofs).
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
"""Dimensions whose map has more runs are gathered index by index."""
_BLOCK = 1 << 15
"""Random values generated at once: with their intermediate arrays, they fit in the processor's cache."""


@dataclass(frozen=True)
class TensorRegion:
    """The position of a part in its whole tensor, where random entries are addressed by their index.

    Attributes:
        shape: shape of the whole tensor.
        corner: index of the part's first entry in it.
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
    region: TensorRegion | None = None,
) -> Tensor:
    """Grow the values of one tensor, or of a part of it.

    Args:
        source: weights, with one map per dimension.
        dims: the map of each dimension.
        std: standard deviation of random entries; 0: they are `constant`.
        constant: value of entries without a source that are not random (1 in a gain, otherwise 0).
        name: canonical name of the target tensor, with its layer: the address of its random parts.
        seed: seed of all random parts.
        noise: relative noise on new copies.
        above: the same tensor of the next layer, if a map takes entries from it.
        shrink: factor on the values before a fresh initialization is added; None: neither.
        region: the part to grow; None: the whole tensor.

    Returns:
        The grown tensor, contiguous, in the dtype of `source`; `source` itself if nothing changes.
    """
    for axis, dim in enumerate(dims):
        if dim.center:
            source = source - source.mean(dim=axis, keepdim=True)
    grown = _gather_layers(source, above, dims, [dim.scale for dim in dims])
    region = region or TensorRegion(tuple(grown.shape), (0,) * grown.dim())
    all_entries = [np.arange(len(dim)) for dim in dims]
    missing = [dim.source == NO_SOURCE for dim in dims]
    if shrink is not None and std:
        fresh = torch.empty_like(grown)
        _set_normal(fresh, all_entries, std, name, seed, region)
        for grid in _flagged_grids(all_entries, missing):
            grown.numpy()[_index(grid)] = 0.0
        return fresh.add_(grown * shrink)  # never fused: an entry's bits must not depend on how the tensor is cut
    for grid in _flagged_grids(all_entries, missing):
        grown.numpy()[_index(grid)] = constant
    if std:
        not_constant = [np.flatnonzero((dim.source != NO_SOURCE) | dim.random) for dim in dims]
        for grid in _flagged_grids(not_constant, missing):
            _set_normal(grown, grid, std, name, seed, region)
    if noise:
        present = [np.flatnonzero(~flags) for flags in missing]
        factor = torch.zeros_like(grown)
        for grid in _flagged_grids(present, [dim.new for dim in dims]):
            _set_normal(factor, grid, noise, name + "/noise", seed, region)
        grown = grown + factor.mul_(grown)
    return grown


def grow_moment(
    source: Tensor, dims: Sequence[DimMap], *, power: int, policy: Moments, above: Tensor | None = None
) -> Tensor:
    """Grow one of Adam's moments.

    Args:
        source: exp_avg (power 1) or exp_avg_sq (power 2).
        dims: the maps of the weights.
        power: the power of the gradient that the moment averages.
        policy: how the moment grows.
        above: the same moment of the next layer, if a map takes entries from it.

    Returns:
        The grown moment; entries without a source are zero.
    """
    if policy is Moments.RESET:
        return source.new_zeros([len(dim) for dim in dims])
    unscaled = policy is Moments.COPY
    scales = [np.ones(len(dim)) if unscaled else dim.gradient**power for dim in dims]
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
    """Values of a fresh tensor at flat indices of its global shape: normal with `std`, or `constant` if `std` is 0."""
    if not std:
        return np.full(index.shape, constant)
    return std * normal(key(seed, name), index)


def initial_part(
    region: TensorRegion,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    *,
    std: float,
    constant: float,
    name: str,
    seed: int,
) -> Tensor:
    """Part of a fresh tensor: the `initial_values` of its box, with little memory beyond the part itself."""
    values = torch.full(lengths, constant, dtype=dtype)
    if std:
        _set_normal(values, [np.arange(length) for length in lengths], std, name, seed, region)
    return values


def roughen(rows_EH: Tensor, new: Flags, noise: float, name: str, seed: int) -> None:
    """Add normal noise to new router rows in region: `noise` times the standard deviation of all its entries."""
    index = np.arange(rows_EH.numel(), dtype=np.uint64).reshape(tuple(rows_EH.shape))
    values = torch.from_numpy(normal(key(seed, name + "/noise"), index)).to(rows_EH.dtype)
    flags = torch.from_numpy(new)
    rows_EH[flags] += noise * rows_EH.std() * values[flags]


def _gather_layers(source: Tensor, above: Tensor | None, dims: Sequence[DimMap], scales: Sequence[Scales]) -> Tensor:
    """Gather from a layer's tensor, and from the next layer's for entries that a map takes from there."""
    grown = _gather(source, dims, scales)
    if above is not None:
        taken = torch.zeros(grown.shape, dtype=torch.bool)
        for grid in _flagged_grids([np.arange(len(dim)) for dim in dims], [dim.above for dim in dims]):
            taken.numpy()[_index(grid)] = True
        grown = torch.where(taken, _gather(above, dims, scales), grown)
    return grown


def _gather(source: Tensor, dims: Sequence[DimMap], scales: Sequence[Scales]) -> Tensor:
    """Gather and scale; `source` itself if nothing changes. Entries without a source have arbitrary values."""
    grown = source
    for axis, (dim, scale) in enumerate(zip(dims, scales, strict=True)):
        if source.shape[axis] != dim.size:
            raise AssertionError(f"dimension {axis} has {source.shape[axis]} entries, but its map expects {dim.size}")
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
    """Gather along one dimension: run by run if there are few, since a run is a plain copy."""
    runs = consecutive_runs(dim.source)
    if len(runs) > _MAX_RUNS:
        return source.index_select(axis, torch.from_numpy(np.maximum(dim.source, 0)))
    lengths = list(source.shape)
    lengths[axis] = len(dim)
    grown = source.new_empty(lengths)
    for target, begin, length in runs:
        grown.narrow(axis, target, length).copy_(source.narrow(axis, begin, length))
    return grown


def _ranges(flags: Flags) -> Iterator[tuple[int, int]]:
    """Start and stop of each range of flagged entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    yield from ((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def _flagged_grids(inside: Sequence[Indices], flags: Sequence[Flags]) -> Iterator[list[Indices]]:
    """Entries within `inside` that are flagged in at least one dimension, as disjoint grids of indices."""
    for axis, flagged in enumerate(flags):
        if not flagged.any():
            continue
        grid = [own[~before[own]] for own, before in zip(inside[:axis], flags[:axis], strict=True)]
        grid += [inside[axis][flagged[inside[axis]]], *inside[axis + 1 :]]
        if all(len(own) for own in grid):
            yield grid


def _index(grid: Sequence[Indices]) -> tuple[Any, ...]:
    """A numpy index for a grid: slices if the indices are consecutive, which is much faster."""
    if all(own[-1] - own[0] + 1 == len(own) for own in grid):
        return tuple(slice(int(own[0]), int(own[-1]) + 1) for own in grid)
    return np.ix_(*grid)


def _set_normal(
    target: Tensor, grid: Sequence[Indices], std: float, name: str, seed: int, region: TensorRegion
) -> None:
    """Set a grid of entries of `target` to normal variates, addressed by flat index in the whole tensor."""
    strides = [math.prod(region.shape[axis + 1 :]) for axis in range(len(grid))]
    address = [
        (own + corner).astype(np.uint64) * np.uint64(stride)
        for own, corner, stride in zip(grid, region.corner, strides, strict=True)
    ]
    inner = math.prod(len(own) for own in grid[1:])
    rows = max(1, _BLOCK // inner)
    stream, view, work = key(seed, name), target.numpy(), workspace(rows * inner)
    for start in range(0, len(grid[0]), rows):
        index = address[0][start : start + rows]
        for offsets in address[1:]:
            index = index[..., None] + offsets
        values = normal(stream, index, work)
        values *= std
        view[_index([grid[0][start : start + rows], *grid[1:]])] = values
