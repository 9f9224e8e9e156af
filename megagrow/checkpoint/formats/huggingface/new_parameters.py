"""What is new in a grown model, by transformers' names, for programs that freeze, group or log parameters.

`new_parameters.json` lists tensors that are new as a whole, and of all others the indices of new rows, columns and
experts. An entry is new if any of its indices is listed. Numbers count from 0, as in the names; a range is [start,
stop).
"""

from typing import Any

import numpy as np

from megagrow.checkpoint.formats.huggingface.placement import BoxPair, tensor_shapes
from megagrow.checkpoint.tensors import TensorKind, source_kind, spans_of, tensor_kinds
from megagrow.config import ModelShape
from megagrow.growth.maps import Flags, GrowthStep


def new_parameters(step: GrowthStep, pairs: tuple[BoxPair, ...], shape: ModelShape) -> dict[str, Any]:
    """Return the content of `new_parameters.json`.

    Args:
        step: the growth step.
        pairs: of the grown model's architecture and shape; padding rows of the vocabulary are not among them.
        shape: of the grown model.
    """
    kinds = {kind.key: kind for kind in tensor_kinds(shape)}
    flags = {key: _flags(kind, step) for key, kind in kinds.items()}
    shapes = tensor_shapes(pairs)
    found: dict[str, list[Flags]] = {name: [np.zeros(size, bool) for size in sizes] for name, sizes in shapes.items()}
    whole: set[str] = set()
    for pair in pairs:
        kind, lead = kinds[pair.key], len(pair.box) - len(pair.place)
        if _is_new(pair, kind, flags[pair.key], step, lead):
            whole.add(pair.name)
            continue
        inner = pair.box[lead:]
        own = flags[pair.key][len(flags[pair.key]) - len(inner) :]
        place = list(zip(inner, own, strict=True))
        for dim, ((start, stop), new) in enumerate(place[::-1] if pair.transposed else place):
            first, last = pair.place[dim]
            found[pair.name][dim][first:last] |= new[start:stop]
    whole |= {name for name, dims in found.items() if any(new.all() for new in dims)}
    partly: dict[str, Any] = {}
    for name, dims in found.items():
        if name not in whole and any(new.any() for new in dims):
            partly[name] = {
                "shape": list(shapes[name]),
                "new": [{"dim": dim, "ranges": spans_of(new)} for dim, new in enumerate(dims) if new.any()],
            }
    return {
        "format": 1,
        "layers": {"count": shape.num_layers, "new": [int(layer) for layer in np.flatnonzero(step.layers.new)]},
        "tensors": {"count": len(shapes), "new": [name for name in shapes if name in whole], "partly_new": partly},
    }


def _flags(kind: TensorKind, step: GrowthStep) -> list[Flags]:
    """Which indices of each dimension of one layer's tensor are new; all, where the parent has no such tensor."""
    if source_kind(kind, step.small) is None:
        return [np.ones(size, bool) for size in kind.layer_shape(step.large)]
    return [dim.grow(step).new for dim in kind.dims]


def _is_new(pair: BoxPair, kind: TensorKind, flags: list[Flags], step: GrowthStep, lead: int) -> bool:
    """Whether a pair is part of a new layer, or of a new expert where each expert has separate tensors."""
    if kind.per_layer and step.layers.new[pair.box[0][0]]:
        return True
    experts = pair.box[1:lead] if kind.per_layer else pair.box[:lead]
    return any(bool(new[start]) for (start, _), new in zip(experts, flags, strict=False))
