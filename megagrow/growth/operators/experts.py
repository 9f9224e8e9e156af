"""Growth of experts: from a dense MLP to a mixture, and from some experts to more.

One view serves both: a dense MLP is G slices of its width side by side (G = 1: itself), so the axis `expert` has G
source entries there and num_moe_experts in a mixture; each target expert copies one of them. What the copies of an
entry carry together is decided by the router, whose weights over the chosen experts add up to 1 in Megatron-Core
(softmax after top-k, its default).

    upcycle            expert e is slice e mod G, read times G by linear_fc2. Its router row is fresh, and the same for
                       the G slices of one copy, so a token chooses whole copies: the weights of each slice add up
                       to 1 / G, and the function stays, whatever the router says. With rows of their own it would
                       stay in expectation only.
    duplicate_experts  experts and their router rows copied in turn. With r copies of each, r times the top-k and no
                       noise all copies of a chosen expert are chosen, each with 1 / r of its weight: exact.

Moments: a copy gets the gradients of the tokens that are routed to it. Its share of the source's is 1 / copies,
exactly for duplicated experts, on average over the copies for upcycled ones: their sum is exact, each one is not.
"""

import numpy as np

from megagrow.config import GrowthConfig, ModelShape
from megagrow.errors import GrowthError
from megagrow.growth.maps import AxisMap, Exactness, ExpertMap, Role, cyclic_copies, shares
from megagrow.growth.operators.registry import find, operator
from megagrow.growth.operators.width import Resize


@operator("upcycle", "expert", exact=Exactness.ALWAYS, paper="Upcycling LLMs into MoE, arXiv 2410.07524")
def upcycle(resize: Resize) -> ExpertMap:
    """A dense MLP, or each of its G slices, copied into experts under a fresh router. Exact.

    Raises:
        GrowthError: the source has experts, has no G slices, or they do not fill the experts or the top-k in whole
            copies.
    """
    if resize.small.num_moe_experts is not None:
        raise GrowthError(
            f"growth.expert: upcycle starts from a dense MLP, not from {resize.small.num_moe_experts} experts; "
            "use duplicate_experts"
        )
    slices = resize.size
    if resize.small.ffn_hidden_size % slices:
        raise GrowthError(
            f"growth.expert: granularity {slices} does not divide ffn_hidden_size {resize.small.ffn_hidden_size}"
        )
    for name, value in (("num_moe_experts", resize.target), ("moe_router_topk", resize.large.moe_router_topk)):
        if value % slices:
            raise GrowthError(
                f"growth.expert: upcycle with granularity {slices} takes whole copies of {slices} experts, but "
                f"{name} is {value}; use a multiple of {slices}"
            )
    source, new = cyclic_copies(slices, resize.target)
    share = shares(source, new, None)
    scale = {Role.READ: np.full(resize.target, float(slices))}
    return ExpertMap(AxisMap(slices, source, new, share, scale, {}), fresh_rows=np.arange(resize.target) // slices)


@operator("duplicate_experts", "expert", exact=Exactness.INTEGER, paper="Orthogonal Growth of MoE, arXiv 2510.08008")
def duplicate_experts(resize: Resize) -> ExpertMap:
    """Experts and router rows copied, with noise on new rows. Exact without it, if top-k grows as the experts do.

    Raises:
        GrowthError: the source has no experts.
    """
    if resize.small.num_moe_experts is None:
        raise GrowthError("growth.expert: duplicate_experts starts from experts, and this MLP is dense; use upcycle")
    source, new = cyclic_copies(resize.size, resize.target)
    noise = resize.options.router_noise if new.any() else 0.0
    alike = resize.large.moe_router_topk * resize.size == resize.small.moe_router_topk * resize.target
    even = AxisMap(resize.size, source, new, shares(source, new, None), {}, {})
    return ExpertMap(even, noise=noise, exact=alike and noise == 0.0)


def grow_experts(
    small: ModelShape, large: ModelShape, growth: GrowthConfig
) -> tuple[ExpertMap | None, str | None, bool]:
    """Return the map of the experts, the operator that made it, and whether it preserves the function.

    None and None where there are no experts; no operator where they stay as they are.
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
