"""Depth operators: which layer of the small model each layer of the large one comes from.

identity   new layers, spread evenly, whose residual writers (linear_proj, linear_fc2 and their biases) are
           zero: they pass their input on exactly and come alive with the first gradient.
redundant  as identity, but silenced by zero norm gains and zero biases. With a gated MLP a zero gain in front of
           it has gradient zero for ever (gate and up are both zero), so there linear_fc2 is zeroed instead.
stack      the small model's layers, once more from the first on.
interpose  each layer followed by its copies.
overlap    the first layers, then the last ones, overlapping in the middle.
random     the small model's layers, then fresh ones.
"""

from megagrow.errors import GrowthError
from megagrow.growth.maps import Exactness, Inside, LayerMap, Silence
from megagrow.growth.operators.registry import operator
from megagrow.growth.operators.width import MASKED_STRUCTURAL_GROWTH, WARMSTARTING, WHEN_AND_HOW, Resize


@operator("identity", "layer", exact=Exactness.ALWAYS, paper="LLaMA-Pro, ACL 2024")
def identity(resize: Resize) -> LayerMap:
    """New layers with zero residual writers, evenly between the old ones. Exact, and alive at the first step."""
    source, new = _spread(resize.size, resize.target)
    return LayerMap(resize.size, source, new, Silence.WRITERS, Inside(resize.options.new_layers))


@operator("redundant", "layer", exact=Exactness.ALWAYS, paper=WHEN_AND_HOW)
def redundant(resize: Resize) -> LayerMap:
    """Copies with zero norm gains and biases (with a gated MLP: zero linear_fc2), evenly spread. Exact."""
    source, new = _spread(resize.size, resize.target)
    return LayerMap(resize.size, source, new, Silence.NORMS)


@operator("interpose", "layer", exact=Exactness.NEVER, paper="Orthogonal Growth of MoE, arXiv 2510.08008")
def interpose(resize: Resize) -> LayerMap:
    """Target layer i is a copy of layer floor(i * L / L')."""
    source, new = _spread(resize.size, resize.target)
    return LayerMap(resize.size, source, new)


@operator("stack", "layer", exact=Exactness.NEVER, paper="G_stack, NeurIPS 2024")
def stack(resize: Resize) -> LayerMap:
    """Target layer i is a copy of layer i mod L."""
    source = tuple(index % resize.size for index in range(resize.target))
    return LayerMap(resize.size, source, tuple(index >= resize.size for index in range(resize.target)))


@operator("overlap", "layer", exact=Exactness.NEVER, paper="SOLAR, NAACL 2024")
def overlap(resize: Resize) -> LayerMap:
    """The first ceil(L'/2) layers, then the last floor(L'/2).

    Raises:
        GrowthError: more than twice the layers.
    """
    if resize.target > 2 * resize.size:
        raise GrowthError(
            f"growth.layer: overlap goes up to twice the layers, not from {resize.size} to {resize.target}; use stack"
        )
    first = -(-resize.target // 2)
    source = (*range(first), *range(resize.size - resize.target // 2, resize.size))
    seen = [index in source[:place] for place, index in enumerate(source)]
    return LayerMap(resize.size, source, tuple(seen))


@operator("random", "layer", exact=Exactness.NEVER, paper=f"baseline of {WHEN_AND_HOW}")
@operator("direct", "layer", exact=Exactness.NEVER, paper=f"baseline of {WHEN_AND_HOW}")
@operator("szp", "layer", exact=Exactness.NEVER, paper=WARMSTARTING)
@operator("masked", "layer", exact=Exactness.MASKED, paper=MASKED_STRUCTURAL_GROWTH)
def random_layers(resize: Resize) -> LayerMap:
    """The old layers, then freshly initialized ones on top."""
    source = tuple(min(index, resize.size - 1) for index in range(resize.target))
    new = tuple(index >= resize.size for index in range(resize.target))
    return LayerMap(resize.size, source, new, inside=Inside.FRESH)


def _spread(size: int, target: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    source = tuple(index * size // target for index in range(target))
    new = tuple(index > 0 and source[index] == source[index - 1] for index in range(target))
    return source, new
