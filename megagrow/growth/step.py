"""One growth step: the maps of all axes between two shapes, and what they promise.

`plan_growth` is pure arithmetic on shapes (no torch, no weights), so it also serves to refuse an impossible
step before anything is queued.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import megagrow.growth.operators
import megagrow.growth.vocabulary  # noqa: F401  registers its operator
from megagrow.config import GrowthConfig, ModelShape
from megagrow.growth.axes import AxisMap
from megagrow.growth.experts import ExpertMap, grow_experts
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
        hidden, ffn, heads, layers, vocab: the maps of the axes; `ffn` is the width of an expert where there are some.
        experts: their map; None in a dense model.
        shared: map of the shared expert's width; None where the source has none.
        moments: the moment policy.
        noise: relative noise on new copies.
        shrink: factor on all old weights, a fresh initialization being added to them (szp); None: not so.
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
    vocab: AxisMap
    moments: Moments
    noise: float
    shrink: float | None
    seed: int
    exact: bool
    operators: dict[str, str]
    experts: ExpertMap | None = None
    shared: AxisMap | None = None


def plan_growth(small: ModelShape, large: ModelShape, growth: GrowthConfig, seed: int) -> GrowthStep:
    """Return the maps that grow `small` into `large`; GrowthError where an operator cannot."""
    for axis, name in growth.operators().items():
        find(axis, name)  # a misspelt operator is an error also where its axis does not grow
    used: dict[str, str] = {}
    exact = growth.noise == 0.0

    def make(axis: str, size: int, target: int, unchanged: Any, *, grows: bool | None = None) -> Any:
        nonlocal exact
        if not (size != target if grows is None else grows):
            return unchanged
        used[axis] = growth.operators()[axis]
        chosen = find(axis, used[axis])
        exact = exact and chosen.exactness.holds(size, target)
        return chosen.make(Resize(axis, size, target, small, large, growth))

    heads = (small.num_attention_heads, large.num_attention_heads)
    hidden = make("hidden", small.hidden_size, large.hidden_size, AxisMap.unchanged(small.hidden_size))
    experts, expert_operator, kept = grow_experts(small, large, growth)
    if expert_operator is not None:
        used["expert"], exact = expert_operator, exact and kept
    slices = growth.granularity if small.num_moe_experts is None and large.num_moe_experts is not None else 1
    width = small.mlp_width // slices
    ffn = make("ffn", width, large.mlp_width, AxisMap.unchanged(width))
    shared = None
    if small.moe_shared_expert_intermediate_size and large.moe_shared_expert_intermediate_size:
        both = (small.moe_shared_expert_intermediate_size, large.moe_shared_expert_intermediate_size)
        shared = make("ffn", *both, AxisMap.unchanged(both[0]))
    regrouped = heads[0] != heads[1] or small.groups != large.groups
    head = make("head", *heads, unchanged_heads(small), grows=regrouped)
    layers = make("layer", small.num_layers, large.num_layers, LayerMap.unchanged(small.num_layers))
    vocab = (small.padded_vocab_size, large.padded_vocab_size)
    rows = make("vocab", *vocab, AxisMap.unchanged(small.padded_vocab_size))
    shrunk = [axis.shrink for axis in (hidden, ffn, head.head) if axis.shrink is not None]
    return GrowthStep(
        small=small,
        large=large,
        hidden=hidden,
        ffn=ffn,
        heads=head,
        layers=layers,
        vocab=rows,
        moments=Moments(growth.moments),
        noise=growth.noise,
        shrink=shrunk[0] if shrunk else None,
        seed=seed,
        exact=exact,
        operators=used,
        experts=experts,
        shared=shared,
    )
