"""Plan a growth step: from two shapes and the options to the maps of all axes.

Pure arithmetic on shapes, without torch or weights, so that an impossible step is rejected before anything is queued.
"""

from typing import Any

from megagrow.config import GrowthConfig, ModelShape
from megagrow.growth.maps import AxisMap, Exactness, GrowthStep, LayerMap, Moments, unchanged_heads
from megagrow.growth.operators.experts import grow_experts
from megagrow.growth.operators.registry import find
from megagrow.growth.operators.resize import Resize


def plan_growth(small: ModelShape, large: ModelShape, growth: GrowthConfig, seed: int) -> GrowthStep:
    """Return the maps that grow `small` into `large`; GrowthError if an operator cannot make its map."""
    for axis, name in growth.operators().items():
        find(axis, name)  # a misspelled operator is an error even if its axis does not grow
    used: dict[str, str] = {}
    masked: set[str] = set()
    exact = growth.noise == 0.0

    def make(axis: str, size: int, target: int, unchanged: Any, *, grows: bool | None = None) -> Any:
        nonlocal exact
        if not (size != target if grows is None else grows):
            return unchanged
        used[axis] = growth.operators()[axis]
        chosen = find(axis, used[axis])
        exact = exact and chosen.exactness.holds(size, target)
        if chosen.exactness is Exactness.MASKED:
            masked.add(axis)
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
    before = exact
    rows = make("vocab", *vocab, AxisMap.unchanged(small.padded_vocab_size))
    if small.vocab_size == large.vocab_size:  # only padding: no token has another logit
        exact = before
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
        masked=frozenset(masked),
        experts=experts,
        shared=shared,
    )
