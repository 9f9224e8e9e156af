"""Growth of attention heads under grouped-query attention.

Groups (KV heads) are mapped first, then the query heads inside each new group from the heads of its source
group, so that a copied query head always meets the copy of its own KV head. Queries and keys are never scaled
(softmax is not linear); what is shared out is `linear_proj`'s reading of a head. A group has no reader of its
own: its share is the common share of its copies, which is what the gradients of k and v carry.
"""

from dataclasses import dataclass

import numpy as np

from megagrow.config import ModelShape
from megagrow.errors import GrowthError
from megagrow.growth.axes import NO_SOURCE, AxisMap, Fill, Role, cyclic_copies, multiplicity, padded
from megagrow.growth.registry import operator


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The maps of both axes of attention: query heads and KV groups."""

    head: AxisMap
    group: AxisMap


@operator("zero_pad", "head", exact=True, paper="bert2BERT (Chen et al., ACL 2022)")
def zero_pad_heads(small: ModelShape, large: ModelShape) -> HeadMap:
    """New heads and groups are random in and zero out; the old ones keep their places in their groups.

    Raises:
        GrowthError: fewer query heads a group than before.
    """
    _refuse_thinner_groups(small, large, "zero_pad")
    groups, new_groups = padded(small.groups, large.groups)
    slots, _ = padded(small.heads_per_group, large.heads_per_group)
    head = _heads_of_groups(groups, slots, small.heads_per_group)
    missing = head == NO_SOURCE
    fill = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.ZERO}
    return HeadMap(
        head=AxisMap(small.num_attention_heads, head, missing, np.ones(len(head)), {}, fill),
        group=AxisMap(small.groups, groups, new_groups, np.ones(len(groups)), {}, fill),
    )


@operator("balanced", "head", exact=True, paper="megagrow design, section 3; bert2BERT (Chen et al., ACL 2022)")
def balanced_heads(small: ModelShape, large: ModelShape) -> HeadMap:
    """Groups are copied in turn, and heads inside them; `linear_proj` reads each copy by 1/c. Exact at any ratio.

    Raises:
        GrowthError: fewer query heads a group than before.
    """
    _refuse_thinner_groups(small, large, "balanced")
    groups, new_groups = cyclic_copies(small.groups, large.groups)
    slots, new_slots = cyclic_copies(small.heads_per_group, large.heads_per_group)
    head = _heads_of_groups(groups, slots, small.heads_per_group)
    new = (new_groups[:, None] | new_slots[None, :]).reshape(-1)
    share = 1.0 / multiplicity(head)
    return HeadMap(
        head=AxisMap(small.num_attention_heads, head, new, share, {Role.READ: share}, {}),
        group=AxisMap(small.groups, groups, new_groups, 1.0 / multiplicity(groups), {}, {}),
    )


def unchanged_heads(shape: ModelShape) -> HeadMap:
    """The maps of heads that do not grow."""
    return HeadMap(head=AxisMap.unchanged(shape.num_attention_heads), group=AxisMap.unchanged(shape.groups))


def _heads_of_groups(groups: "np.ndarray", slots: "np.ndarray", per_group: int) -> "np.ndarray":
    """[G * R] source head of each target head, from the source of its group [G] and of its slot [R]."""
    found = (groups[:, None] != NO_SOURCE) & (slots[None, :] != NO_SOURCE)
    return np.where(found, groups[:, None] * per_group + slots[None, :], NO_SOURCE).reshape(-1)


def _refuse_thinner_groups(small: ModelShape, large: ModelShape, name: str) -> None:
    if large.heads_per_group < small.heads_per_group:
        raise GrowthError(
            f"growth.head: {name} cannot go from {small.heads_per_group} to {large.heads_per_group} query heads a "
            f"group ({small.num_attention_heads} heads / {small.groups} groups -> {large.num_attention_heads} / "
            f"{large.groups}): heads would lose their KV head; keep at least {small.heads_per_group} a group"
        )
