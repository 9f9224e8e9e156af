"""Apply the maps: one tensor of one layer at a time, weights and moments alike.

A tensor grows dimension by dimension, W'[.., j, ..] = scale(j) * W[.., source(j), ..]; what has no source is filled.
Moments go by the dual scale (`DimMap.gradient`), the first with the scale and the second with its square.
Works in the dtype that it is given (float32 in the converter, float64 in proofs).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagrow.growth.axes import NO_SOURCE, DimMap, Flags, Scales
from megagrow.growth.random import key, normal
from megagrow.growth.step import Moments


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
) -> Tensor:
    """Grow the values of one tensor.

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

    Returns:
        The grown tensor, contiguous, in the dtype of `source`.
    """
    for axis, dim in enumerate(dims):
        if dim.center:
            source = source - source.mean(dim=axis, keepdim=True)
    grown = _gather_layers(source, above, dims, [dim.scale for dim in dims])
    if shrink is not None and std:
        everywhere = np.ones(grown.shape, dtype=bool)
        fresh = torch.zeros_like(grown)
        _set_normal(fresh, everywhere, std, name, seed)
        padding = torch.from_numpy(_any([dim.source == NO_SOURCE for dim in dims]))
        return fresh + shrink * grown.masked_fill(padding, 0.0)
    missing = _any([dim.source == NO_SOURCE for dim in dims])
    if missing.any():
        grown[torch.from_numpy(missing)] = constant
        if std:
            silent = _any([(dim.source == NO_SOURCE) & ~dim.random for dim in dims])
            _set_normal(grown, missing & ~silent, std, name, seed)
    if noise:
        copies = _any([dim.new for dim in dims]) & ~missing
        factor = torch.zeros_like(grown)
        _set_normal(factor, copies, noise, name + "/noise", seed)
        grown += grown * factor
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
            grown.index_fill_(axis, torch.from_numpy(np.flatnonzero(flags)), 0.0)
    return grown


def initial_values(
    index: NDArray[np.uint64], *, std: float, constant: float, name: str, seed: int
) -> NDArray[np.float64]:
    """Values of a fresh tensor at flat indices of its global shape: normal with `std`, or `constant` where it is 0."""
    if not std:
        return np.full(index.shape, constant)
    return std * normal(key(seed, name), index)


def dense_slices(values: Tensor, slices: int, dim: int, blocks: int) -> Tensor:
    """A dense tensor as a stack of slices of the MLP's width.

    Args:
        values: of one layer.
        slices: G.
        dim: the dimension that lies on ffn.
        blocks: parts of it that are sliced alike: 2 for gate and up.

    Returns:
        [G, ...], each of them in the order of rows of a narrower MLP.
    """
    parts = values.chunk(slices * blocks, dim)
    return torch.stack([torch.cat(parts[index::slices], dim) for index in range(slices)])


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
        taken = torch.from_numpy(_any([dim.above for dim in dims]))
        grown = torch.where(taken, _gather(above, dims, scales), grown)
    return grown


def _gather(source: Tensor, dims: Sequence[DimMap], scales: Sequence[Scales]) -> Tensor:
    grown = source
    for axis, (dim, scale) in enumerate(zip(dims, scales, strict=True)):
        if source.shape[axis] != dim.size:
            raise AssertionError(f"dimension {axis} has {source.shape[axis]} entries, its map expects {dim.size}")
        if not dim.trivial:
            grown = grown.index_select(axis, torch.from_numpy(np.maximum(dim.source, 0)))
        if (scale != 1.0).any():
            shape = [-1 if other == axis else 1 for other in range(source.dim())]
            grown = grown * torch.from_numpy(scale).to(source.dtype).view(shape)
    return grown.clone() if grown.data_ptr() == source.data_ptr() else grown.contiguous()


def _any(flags: Sequence[Flags]) -> Flags:
    """Flags of entries that are set in at least one dimension, in the tensor's shape."""
    result = np.zeros([len(f) for f in flags], dtype=bool)
    for axis, dim in enumerate(flags):
        result |= dim.reshape([-1 if other == axis else 1 for other in range(len(flags))])
    return result


def _set_normal(target: Tensor, where: Flags, std: float, name: str, seed: int) -> None:
    """Set the flagged entries of `target` to normal variates addressed by their flat index."""
    index = np.flatnonzero(where).astype(np.uint64)
    values = torch.from_numpy(std * normal(key(seed, name), index)).to(target.dtype)
    assert target.is_contiguous()
    target.view(-1)[torch.from_numpy(index.astype(np.int64))] = values
