"""Expert operators: from a dense MLP to a mixture of experts, and from a mixture to more experts.

Both use one view. A dense MLP is G slices of its width next to each other (G = 1: the MLP itself), so the axis
`expert` has G source entries for a dense MLP and num_moe_experts for a mixture, and each target expert copies one of
them. The combined weight of the copies of an entry depends on the router, whose weights over the chosen experts add
up to 1 in Megatron-Core (softmax after top-k, its default).

    upcycle            expert e is slice e mod G, and linear_fc2 reads it times G. Its router row is fresh, and the same
                       for the G slices of one copy, so a token chooses whole copies: the weights of each slice add up
                       to 1 / G, which preserves the function for any router. With a separate row for each expert,
                       the function would be preserved in expectation only.
    duplicate_experts  experts and their router rows are copied in turn. With r copies of each, r times the top-k and no
                       noise, all copies of a chosen expert are chosen, each with 1 / r of its weight: exact.

Moments: a copy gets the gradients of the tokens routed to it. Its share of the source's gradient is 1 / copies: exactly
for duplicated experts, on average over the copies for upcycled ones, where the sum is exact but each copy is not.
"""

import numpy as np

from megagrow.config import GrowthConfig, ModelShape
from megagrow.errors import GrowthError
from megagrow.growth.maps import AxisMap, Exactness, ExpertMap, Role, cyclic_copies, shares
from megagrow.growth.operators.papers import ORTHOGONAL_GROWTH
from megagrow.growth.operators.registry import find, operator
from megagrow.growth.operators.resize import Resize


@operator("upcycle", "expert", exact=Exactness.ALWAYS, paper="Upcycling LLMs into MoE, arXiv 2410.07524")
def upcycle(resize: Resize) -> ExpertMap:
    """The dense MLP, or each of its G slices, is copied into experts under a fresh router. Exact.

    Raises:
        GrowthError: the source has experts, G does not divide its width, or G does not divide the experts or the top-k.
    """
    if resize.small.num_moe_experts is not None:
        raise GrowthError(
            f"growth.expert: upcycle needs a dense source, not one with {resize.small.num_moe_experts} experts; "
            "use duplicate_experts"
        )
    slices = resize.size
    if resize.small.ffn_hidden_size % slices:
        raise GrowthError(f"growth.granularity {slices} does not divide ffn_hidden_size {resize.small.ffn_hidden_size}")
    for name, value in (("num_moe_experts", resize.target), ("moe_router_topk", resize.large.moe_router_topk)):
        if value % slices:
            raise GrowthError(
                f"growth.granularity {slices} does not divide {name} {value}: upcycle makes whole copies of {slices} "
                f"experts; use a multiple of {slices}"
            )
    source, new = cyclic_copies(slices, resize.target)
    share = shares(source, new, None)
    scale = {Role.READ: np.full(resize.target, float(slices))}
    return ExpertMap(AxisMap(slices, source, new, share, scale, {}), fresh_rows=np.arange(resize.target) // slices)


@operator("duplicate_experts", "expert", exact=Exactness.INTEGER, paper=ORTHOGONAL_GROWTH)
def duplicate_experts(resize: Resize) -> ExpertMap:
    """Experts and router rows are copied, with noise on new rows. Exact without it if top-k grows by the same factor.

    Raises:
        GrowthError: the source has no experts.
    """
    if resize.small.num_moe_experts is None:
        raise GrowthError("growth.expert: duplicate_experts needs a source with experts, not a dense one; use upcycle")
    source, new = cyclic_copies(resize.size, resize.target)
    noise = resize.options.router_noise if new.any() else 0.0
    same_factor = resize.large.moe_router_topk * resize.size == resize.small.moe_router_topk * resize.target
    even = AxisMap(resize.size, source, new, shares(source, new, None), {}, {})
    return ExpertMap(even, noise=noise, exact=same_factor and noise == 0.0)


def grow_experts(
    small: ModelShape, large: ModelShape, growth: GrowthConfig
) -> tuple[ExpertMap | None, str | None, bool]:
    """Return the map of the experts, the operator that made it, and whether it preserves the function.

    The map is None in a dense model. The operator is None if there are no experts or they do not change.
    """
    target, source = large.num_moe_experts, small.num_moe_experts
    if target is None:
        return None, None, True
    if source == target and small.moe_router_topk == large.moe_router_topk:
        return ExpertMap(AxisMap.unchanged(target)), None, True
    size = growth.granularity if source is None else source
    name = growth.expert or ("upcycle" if source is None else "duplicate_experts")
    chosen = find("expert", name)
    grown: ExpertMap = chosen.make(Resize("expert", size, target, small, large, growth))
    return grown, name, grown.exact and chosen.exactness.holds(size, target)
