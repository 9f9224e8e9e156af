"""One growth step: the maps of all axes between two shapes, and what they promise.

`plan_growth` is pure arithmetic on shapes (no torch, no weights), so it also serves to refuse an impossible
step before anything is queued.
"""

from dataclasses import dataclass
from enum import Enum

import megagrow.growth.operators  # noqa: F401  registers the width operators
from megagrow.config import GrowthConfig, ModelShape
from megagrow.growth.axes import AxisMap
from megagrow.growth.heads import HeadMap, unchanged_heads
from megagrow.growth.layers import LayerMap
from megagrow.growth.operators import Resize
from megagrow.growth.registry import find


class Moments(Enum):
    """What becomes of Adam's moments; masters and weights grow as values."""

    EXACT = "exact"
    """By duality, for every entry with a source."""
    COPY = "copy"
    """Gathered, unscaled."""
    ASYMMETRIC = "asymmetric"
    """Exact for old entries, zero for new ones: copies come apart."""
    RESET = "reset"
    """Zero, and the step count too."""


@dataclass(frozen=True, eq=False)
class GrowthStep:
    """The maps of one growth step.

    Attributes:
        small, large: the two shapes.
        hidden, ffn, heads, layers: the maps of the axes.
        moments: the moment policy.
        noise: relative noise on new copies.
        seed: of all random parts.
        exact: whether the grown model computes the same function.
        operators: operator used on each axis that grows.
    """

    small: ModelShape
    large: ModelShape
    hidden: AxisMap
    ffn: AxisMap
    heads: HeadMap
    layers: LayerMap
    moments: Moments
    noise: float
    seed: int
    exact: bool
    operators: dict[str, str]


def plan_growth(small: ModelShape, large: ModelShape, growth: GrowthConfig, seed: int) -> GrowthStep:
    """Return the maps that grow `small` into `large`; GrowthError where an operator cannot."""
    for axis, name in growth.operators().items():
        find(axis, name)  # a misspelt operator is an error also where its axis does not grow
    used: dict[str, str] = {}
    exact = growth.noise == 0.0

    def width(axis: str, name: str, size: int, target: int) -> AxisMap:
        if size == target:
            return AxisMap.unchanged(size)
        used[axis] = name
        made = find(axis, name).make(Resize(axis=axis, size=size, target=target, small=small, large=large))
        assert isinstance(made, AxisMap)
        return made

    hidden = width("hidden", growth.hidden, small.hidden_size, large.hidden_size)
    ffn = width("ffn", growth.ffn, small.ffn_hidden_size, large.ffn_hidden_size)
    heads = unchanged_heads(small)
    if (small.num_attention_heads, small.groups) != (large.num_attention_heads, large.groups):
        used["head"] = growth.head
        heads = find("head", growth.head).make(small, large)
    layers = LayerMap.unchanged(small.num_layers)
    if small.num_layers != large.num_layers:
        used["layer"] = growth.layer
        layers = find("layer", growth.layer).make(small.num_layers, large.num_layers, growth)
    return GrowthStep(
        small=small,
        large=large,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        layers=layers,
        moments=Moments(growth.moments),
        noise=growth.noise,
        seed=seed,
        exact=exact and all(find(axis, name).exact for axis, name in used.items()),
        operators=used,
    )
