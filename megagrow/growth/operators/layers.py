"""Depth operators: which source layer each layer of the target comes from.

identity   new layers, evenly spread, whose residual writers (linear_proj, linear_fc2 and their biases) are zero:
           they pass their input on exactly, and get a gradient at the first step.
redundant  like identity, but with zero norm gains and zero biases. In front of a gated MLP, a zero gain would keep
           a zero gradient forever (gate and up are both zero), so there linear_fc2 is zeroed instead.
stack      the source's layers, repeated from the first.
interpose  each layer followed by its copies.
overlap    the first layers, then the last ones, overlapping in the middle.
random     the source's layers, then fresh ones.
"""

from megagrow.errors import GrowthError
from megagrow.growth.maps import Exactness, Inside, LayerMap, Silence
from megagrow.growth.operators.papers import MASKED_STRUCTURAL_GROWTH, ORTHOGONAL_GROWTH, WARMSTARTING, WHEN_AND_HOW
from megagrow.growth.operators.registry import operator
from megagrow.growth.operators.resize import Resize


@operator("identity", "layer", exact=Exactness.ALWAYS, paper="LLaMA-Pro, ACL 2024")
def identity(resize: Resize) -> LayerMap:
    """New layers with zero residual writers, evenly spread. Exact, with gradients from the first step."""
    source, new = _spread(resize.size, resize.target)
    return LayerMap(resize.size, source, new, Silence.WRITERS, Inside(resize.options.new_layers))


@operator("redundant", "layer", exact=Exactness.ALWAYS, paper=WHEN_AND_HOW)
def redundant(resize: Resize) -> LayerMap:
    """Copies with zero norm gains and biases (in a gated MLP: zero linear_fc2), evenly spread. Exact."""
    source, new = _spread(resize.size, resize.target)
    return LayerMap(resize.size, source, new, Silence.NORMS)


@operator("interpose", "layer", exact=Exactness.NEVER, paper=ORTHOGONAL_GROWTH)
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
        GrowthError: the target has more than twice the layers.
    """
    if resize.target > 2 * resize.size:
        raise GrowthError(
            f"growth.layer: overlap at most doubles the layers, and {resize.target} is more than twice {resize.size}; "
            "use stack"
        )
    first = -(-resize.target // 2)
    source = (*range(first), *range(resize.size - resize.target // 2, resize.size))
    new = tuple(index in source[:position] for position, index in enumerate(source))
    return LayerMap(resize.size, source, new)


@operator("random", "layer", exact=Exactness.NEVER, paper=f"baseline of {WHEN_AND_HOW}")
@operator("direct", "layer", exact=Exactness.NEVER, paper=f"baseline of {WHEN_AND_HOW}")
@operator("szp", "layer", exact=Exactness.NEVER, paper=WARMSTARTING)
@operator("masked", "layer", exact=Exactness.MASKED, paper=MASKED_STRUCTURAL_GROWTH)
def random_layers(resize: Resize) -> LayerMap:
    """The old layers, then freshly initialized ones."""
    source = tuple(min(index, resize.size - 1) for index in range(resize.target))
    new = tuple(index >= resize.size for index in range(resize.target))
    return LayerMap(resize.size, source, new, inside=Inside.FRESH)


def _spread(size: int, target: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """`source` and `new` of layers whose copies directly follow them, evenly spread."""
    source = tuple(index * size // target for index in range(target))
    new = tuple(index > 0 and source[index] == source[index - 1] for index in range(target))
    return source, new
