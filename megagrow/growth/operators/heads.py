"""Head operators: growth of query heads and KV groups under grouped-query attention.

Groups (KV heads) are mapped first, then the query heads in each target group from the heads of its source group, so
that a copied query head always attends with a copy of its own KV head. Queries and keys are never scaled, since
softmax is not linear; shares apply where `linear_proj` reads a head.

Nothing reads a group directly: its share, which scales the gradients of k and v, is that of each of its heads. If the
target has fewer query heads per group, the heads of a group are distributed over its copies. The k and v of a copy
then see only some of the heads, so no multiple of the source's gradient is theirs: a limit of `exact` moments.
"""

import numpy as np

from megagrow.errors import GrowthError
from megagrow.growth.maps import (
    NO_SOURCE,
    AxisMap,
    Exactness,
    Fill,
    Flags,
    HeadMap,
    Indices,
    Role,
    Scales,
    cyclic_copies,
    padded,
    shares,
)
from megagrow.growth.operators.papers import (
    BERT2BERT,
    MASKED_STRUCTURAL_GROWTH,
    SPARKLING,
    WARMSTARTING,
    WHEN_AND_HOW,
)
from megagrow.growth.operators.registry import operator
from megagrow.growth.operators.resize import Resize
from megagrow.growth.operators.width import rms_read_scale


@operator("zero_pad", "head", exact=Exactness.ALWAYS, paper=BERT2BERT)
def zero_pad_heads(resize: Resize) -> HeadMap:
    """New heads and groups are random in and zero out; old ones are unchanged. Exact at any valid combination.

    If the target has fewer query heads per group, old heads move to copies of their group.

    Raises:
        GrowthError: the target's groups have no room for all old heads.
    """
    return _pad(resize, {Role.WRITE: Fill.RANDOM, Role.READ: Fill.ZERO})


@operator("balanced", "head", exact=Exactness.ALWAYS, paper=BERT2BERT)
@operator("fpi", "head", exact=Exactness.ALWAYS, paper=BERT2BERT)
def copy_heads(resize: Resize) -> HeadMap:
    """Groups are copied in turn, and heads inside them; `linear_proj` reads each copy times its share. Exact.

    Raises:
        GrowthError: the target's groups have no room for all old heads.
    """
    return _copy(resize)


@operator("aki", "head", exact=Exactness.NEVER, paper=BERT2BERT)
def aki_heads(resize: Resize) -> HeadMap:
    """Like fpi, but new heads and the k and v of new groups come from the next layer (the top layer from itself)."""
    return _copy(resize, above=True)


@operator("rms_copy", "head", exact=Exactness.DOUBLE, paper=SPARKLING)
def rms_copy_heads(resize: Resize) -> HeadMap:
    """Copies that `linear_proj` all reads with the scale that preserves the root mean square of its output."""
    return _copy(resize, read=rms_read_scale(resize.size, resize.target))


@operator("direct", "head", exact=Exactness.NEVER, paper=f"baseline of {WHEN_AND_HOW}")
@operator("masked", "head", exact=Exactness.MASKED, paper=MASKED_STRUCTURAL_GROWTH)
@operator("progressive", "head", exact=Exactness.MASKED, paper=WHEN_AND_HOW)
def random_rest_heads(resize: Resize) -> HeadMap:
    """Old heads are unchanged; new ones are random on both sides."""
    return _pad(resize, {Role.WRITE: Fill.RANDOM, Role.READ: Fill.RANDOM})


@operator("szp", "head", exact=Exactness.NEVER, paper=WARMSTARTING)
def shrink_pad_perturb_heads(resize: Resize) -> HeadMap:
    """Old heads times lambda in a corner of zeros, plus a fresh initialization over everything."""
    return _pad(resize, {}, shrink=resize.options.shrink)


def _pad(resize: Resize, fill: dict[Role, Fill], shrink: float | None = None) -> HeadMap:
    """Every old head once; the rest have no source."""
    small, large = resize.small, resize.large
    if large.heads_per_group >= small.heads_per_group:
        groups, new_groups = padded(small.groups, large.groups)
    else:
        groups, new_groups = cyclic_copies(small.groups, large.groups)
    slots = _slots(resize)
    head = _heads(groups, np.where(slots < small.heads_per_group, slots, NO_SOURCE), small.heads_per_group)
    _check_complete(resize, head)
    missing = head == NO_SOURCE
    ones = np.ones(len(head))
    return HeadMap(
        head=AxisMap(small.num_attention_heads, head, missing, ones, {}, fill, shrink=shrink),
        group=AxisMap(small.groups, groups, new_groups, _group_share(resize, 1.0), {}, fill, shrink=shrink),
    )


def _copy(resize: Resize, *, above: bool = False, read: float | None = None) -> HeadMap:
    """Every head is a copy. `read`: one scale for all readers, in place of the shares."""
    small, large = resize.small, resize.large
    groups, new_groups = cyclic_copies(small.groups, large.groups)
    slots = _slots(resize)
    head = _heads(groups, slots % small.heads_per_group, small.heads_per_group)
    _check_complete(resize, head)
    new = _repeated(head)
    of_group = shares(groups, new_groups, resize.options.share_of_new)
    share = _head_shares(resize, head, new, of_group)
    scale = {Role.READ: share if read is None else np.full(len(head), read)}
    from_next_layer = (new, new_groups) if above else (None, None)
    if read is not None:
        share, of_group = scale[Role.READ], np.full(len(groups), read * large.heads_per_group / small.heads_per_group)
    return HeadMap(
        head=AxisMap(small.num_attention_heads, head, new, share, scale, {}, above=from_next_layer[0]),
        group=AxisMap(
            small.groups, groups, new_groups, _group_share(resize, of_group), {}, {}, above=from_next_layer[1]
        ),
    )


def _head_shares(resize: Resize, head: Indices, new: Flags, of_group: Scales) -> Scales:
    """[G * R] share of each head: its group's times its own within the group, so that k and v have one share each."""
    small, large = resize.small, resize.large
    if large.heads_per_group < small.heads_per_group:
        return shares(head, new, resize.options.share_of_new)
    slots, new_slots = cyclic_copies(small.heads_per_group, large.heads_per_group)
    inside = shares(slots, new_slots, resize.options.share_of_new)
    return np.outer(of_group, inside).reshape(-1)


def _slots(resize: Resize) -> Indices:
    """[G, R] which head of the source group each slot takes; beyond its last head, the count continues."""
    small, large = resize.small, resize.large
    slots = np.tile(np.arange(large.heads_per_group), (large.groups, 1))
    if large.heads_per_group < small.heads_per_group:
        slots = slots + (np.arange(large.groups) // small.groups)[:, None] * large.heads_per_group
    return slots


def _heads(groups: Indices, slots: Indices, per_group: int) -> Indices:
    """[G * R] source of each head, from the source of its group [G] and of its slot [G, R]."""
    found = (groups[:, None] != NO_SOURCE) & (slots != NO_SOURCE)
    return np.where(found, groups[:, None] * per_group + slots, NO_SOURCE).reshape(-1)


def _repeated(source: Indices) -> Flags:
    """[N] whether an entry is a copy of its source beyond the first."""
    _, first = np.unique(source, return_index=True)
    new = np.ones(len(source), dtype=bool)
    new[first] = False
    return new


def _group_share(resize: Resize, share: Scales | float) -> Scales:
    """[G] share of k and v; in a group whose heads are distributed over copies, the part of the heads in a copy."""
    part = min(1.0, resize.large.heads_per_group / resize.small.heads_per_group)
    distributed = resize.large.heads_per_group < resize.small.heads_per_group
    return np.full(resize.large.groups, part if distributed else 1.0) * (1.0 if distributed else share)


def _check_complete(resize: Resize, head: Indices) -> None:
    """Raise GrowthError if the copies of a group have fewer slots than the group has heads."""
    small, large = resize.small, resize.large
    lost = small.num_attention_heads - len(set(head[head != NO_SOURCE].tolist()))
    if lost:
        raise GrowthError(
            f"growth.head: from {small.num_attention_heads} heads in {small.groups} groups to "
            f"{large.num_attention_heads} in {large.groups}, {lost} old heads would lose their KV head: "
            f"{large.groups // small.groups} copies of a group with {large.heads_per_group} query heads each have no "
            f"room for {small.heads_per_group}; keep {small.heads_per_group} query heads per group, or set "
            f"num_query_groups {-(-small.heads_per_group // large.heads_per_group) * small.groups}"
        )
