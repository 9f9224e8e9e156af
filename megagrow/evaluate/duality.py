"""The dual rule: predicts a grown model's gradients from its parent's.

An exact step grows a gradient as it grows exp_avg under the policy `exact`. The comparison covers the entries that have
a source, in old layers. The rule has these limits, all of which `prediction_errors` respects:

- Entries without a source and new layers: the parent has no gradient for them.
- Centered zero-padding (LayerNorm): the new coordinates enter the mean that LayerNorm subtracts from its gradient, so
  writers are compared after subtracting their mean over the old coordinates, which the parent's gradient does not
  have either, and which has no effect on later layers.
- Thinner KV groups: a copy's k and v serve only some of the heads; their rows are left out.
- Copied experts: each has the gradients of the tokens routed to it. There is no prediction.
- A norm's gradient follows its source only where a copy is written with the square root of its share,
  write^2 n/N = share. Other copies (uneven shares under `fpi`, or under LayerNorm, whose mean needs copies of equal
  size) preserve the function but follow no such rule: `rule_limits` reports it, and nothing is compared.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint.tensors import TensorKind, dimensions, tensor_kinds
from megagrow.growth.maps import NO_SOURCE, DimMap, GrowthStep, Moments, Role
from megagrow.growth.values.grow import grow_moment

_FLOOR = 1e-4
"""Errors are relative to a kind's largest gradient, but at least to this fraction of the model's largest: some
gradients are zero up to rounding (softmax is invariant to a bias of the keys)."""


def rule_limits(step: GrowthStep) -> tuple[str, ...]:
    """Describe where the dual rule does not apply to a step; empty if it applies to all that is not new."""
    limits = []
    if not step.exact:
        limits.append("the operators do not preserve the function")
    elif not _norm_follows_source(step):
        limits.append("hidden copies are not written with the square root of their shares: the norm's gradient differs")
    if step.hidden.center:
        limits.append("centered LayerNorm: writers are compared up to their mean")
    if _has_thinner_groups(step):
        limits.append("thinner KV groups: k and v are left out")
    if "expert" in step.operators:
        limits.append("copied experts: each has the gradients of the tokens that are routed to it")
    if any(step.layers.new):
        limits.append("new layers have no source gradient")
    return tuple(limits)


def rule_applies(step: GrowthStep) -> bool:
    """Whether the rule predicts any gradients of old layers."""
    return step.exact and _norm_follows_source(step) and "expert" not in step.operators


def prediction_errors(
    step: GrowthStep, parent: Mapping[str, Tensor], child: Mapping[str, Tensor]
) -> dict[str, tuple[float, int]]:
    """Compare predicted gradients with the actual ones.

    Args:
        step: the growth step that made the child.
        parent, child: gradients by canonical key, layers stacked, on the same tokens.

    Returns:
        By key of the child: largest difference relative to the kind's largest gradient, and number of compared
        entries.
    """
    floor = _FLOOR * max(float(gradient.abs().max()) for gradient in child.values())
    errors = {}
    for kind in tensor_kinds(step.large):
        dims = tuple(dim.grow(step) for dim in kind.dims)
        chosen = [torch.from_numpy(indices) for indices in _indices_with_source(kind, dims, step)]
        difference, largest, count = 0.0, floor, 0
        for small, large in _layers(kind, step, parent[kind.key], child[kind.key]):
            predicted = _take(grow_moment(small, dims, power=1, policy=Moments.EXACT), chosen)
            actual = _take(large, chosen)
            for axis, dim in enumerate(dims):
                if dim.center:
                    predicted = predicted - predicted.mean(axis, keepdim=True)
                    actual = actual - actual.mean(axis, keepdim=True)
            if actual.numel():
                difference = max(difference, float((predicted - actual).abs().max()))
                largest = max(largest, float(actual.abs().max()))
                count += actual.numel()
        errors[kind.key] = (difference / largest, count)
    return errors


def _layers(kind: TensorKind, step: GrowthStep, parent: Tensor, child: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of a kind to compare, parent and child, layer by layer."""
    if not kind.per_layer:
        return [(parent, child)]
    layers = zip(step.layers.source, step.layers.new, strict=True)
    return [(parent[source], child[layer]) for layer, (source, new) in enumerate(layers) if not new]


def _indices_with_source(kind: TensorKind, dims: tuple[DimMap, ...], step: GrowthStep) -> list[np.ndarray]:
    """Return the indices, in every dimension, whose entries have a source gradient."""
    flags = [dim.source != NO_SOURCE for dim in dims]
    if _has_thinner_groups(step) and kind.dims[0] is dimensions.QKV_ROWS:
        slots = step.large.heads_per_group + 2
        slot = np.arange(len(flags[0])) // step.large.head_dim % slots
        flags[0] = flags[0] & (slot < step.large.heads_per_group)
    return [np.flatnonzero(flag) for flag in flags]


def _take(values: Tensor, chosen: list[Tensor]) -> Tensor:
    for axis, indices in enumerate(chosen):
        values = values.index_select(axis, indices)
    return values


def _has_thinner_groups(step: GrowthStep) -> bool:
    return step.large.heads_per_group < step.small.heads_per_group


def _norm_follows_source(step: GrowthStep) -> bool:
    hidden = step.hidden
    write = hidden.scale.get(Role.WRITE, np.ones(len(hidden)))
    sourced = hidden.source != NO_SOURCE
    return bool(np.allclose((write**2 * hidden.size / len(hidden))[sourced], hidden.share[sourced], rtol=1e-12))
