"""How each tensor of a conversion is made, decided before anything is read."""

from typing import TYPE_CHECKING

import numpy as np

from megagrow.checkpoint.index import Source
from megagrow.checkpoint.tensors import TensorKind, dimensions
from megagrow.growth.maps import NO_SOURCE, DimMap, GrowthStep, Inside, Silence

if TYPE_CHECKING:
    from megagrow.convert.plan.plan import ConversionPlan


def is_copy(conversion: "ConversionPlan", source: Source) -> bool:
    """Whether all values of a conversion are their source's own, of the same type, in whole rows."""
    step = conversion.step
    if conversion.has_optimizer or step.noise or step.shrink is not None:
        return False
    whole_rows: dict[str, bool] = {}
    for task in conversion.tasks:
        kind = task.kind
        if task.origin is None or (task.new and (silenced(kind, step) or step.layers.inside is Inside.FRESH)):
            return False
        if kind.key not in whole_rows:
            rows = 1 if kind.per_expert else 0
            maps = [dim.grow(step) for dim in kind.dims]
            quiet = kind.dims[0] is not dimensions.ROUTER_ROWS or step.experts is None or not step.experts.noise
            plain = all(is_plain(dim) for dim in maps) and quiet
            same = source.tensors[task.origin.key].dtype == conversion.weight_dtype
            whole_rows[kind.key] = plain and same and all(_is_identity(dim) for dim in maps[rows + 1 :])
        if not whole_rows[kind.key]:
            return False
    return True


def is_plain(dim: DimMap) -> bool:
    """Whether a map takes every entry from a source, as it is."""
    return not (dim.center or dim.above.any() or (dim.scale != 1.0).any() or (dim.source == NO_SOURCE).any())


def silenced(kind: TensorKind, step: GrowthStep) -> bool:
    """Whether a tensor is zero in new layers, so that they pass their input on."""
    if step.layers.silence is Silence.WRITERS:
        return kind.residual_writer
    if step.layers.silence is Silence.NORMS:
        gated = step.large.swiglu or step.experts is not None
        return kind.silences_gated if gated else kind.silences
    return False


def _is_identity(dim: DimMap) -> bool:
    return len(dim) == dim.size and bool((dim.source == np.arange(dim.size)).all())
