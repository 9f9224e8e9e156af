"""How the weights of each target tensor are made: copied, grown, fresh or zero. Decided before any value is read.

"Weights" are the masters where the target gets Adam's state, since the model's own weights are rounded from them.
Moments follow the growth step's policy and have no recipe.
"""

from enum import Enum

from megagrow.checkpoint.tensors import TensorKind, dimensions
from megagrow.growth.maps import NO_SOURCE, DimMap, GrowthStep, Inside, Silence


class Recipe(Enum):
    """How one target tensor's weights are made."""

    COPY = "copy"
    """Every value is one of the source's, bit for bit; entries may be repeated or reordered."""
    GROW = "grow"
    """Computed from the source's values: scaled, padded, averaged, noised or cast to another type."""
    FRESH = "fresh"
    """Initial values, random or constant."""
    ZERO = "zero"
    """Zeros, so that new parts add nothing to the residual stream yet."""


def recipe_of(
    kind: TensorKind, origin: TensorKind | None, step: GrowthStep, *, is_new_layer: bool, is_copied: bool
) -> Recipe:
    """Return the recipe of one tensor of one target layer.

    Args:
        kind: row of the tensor table.
        origin: row of the source's tensor; None if the source has none.
        step: the growth step.
        is_new_layer: whether the target layer is new.
        is_copied: whether an old layer's tensor of this kind is a bit-for-bit copy.
    """
    if is_new_layer and is_silenced(kind, step):
        return Recipe.ZERO
    is_fresh_layer = is_new_layer and step.layers.inside is Inside.FRESH
    if origin is None or is_fresh_layer:
        # what joins an old layer (a shared expert) must add nothing to it at first
        return Recipe.ZERO if kind.residual_writer and not is_fresh_layer else Recipe.FRESH
    return Recipe.COPY if is_copied else Recipe.GROW


def keeps_values(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a growth step only repeats and reorders the source's values in tensors of a kind."""
    if step.noise or step.shrink is not None:
        return False
    if kind.dims[0] is dimensions.ROUTER_ROWS and step.experts is not None and step.experts.noise:
        return False
    return all(_is_gather(dim.grow(step)) for dim in kind.dims)


def is_silenced(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a tensor is zero in new layers, so that they pass their input on."""
    if step.layers.silence is Silence.WRITERS:
        return kind.residual_writer
    if step.layers.silence is Silence.NORMS:
        gated = step.large.swiglu or step.experts is not None
        return kind.silences_gated if gated else kind.silences
    return False


def _is_gather(dim: DimMap) -> bool:
    """Whether a map takes every entry from a source entry of the same layer, unchanged."""
    return not (dim.center or dim.above.any() or (dim.scale != 1.0).any() or (dim.source == NO_SOURCE).any())
