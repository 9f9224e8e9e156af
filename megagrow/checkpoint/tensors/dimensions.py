"""The dimensions of canonical tensors: how long each is, and how it grows.

Plain dimensions are along one axis. Fused ones interleave several, in Megatron's own row order:

    linear_qkv rows    for each KV group: its query heads, then k, then v, each of head_dim rows
    linear_fc1 rows    SwiGLU: all gate rows, then all up rows
    linear_proj columns    head_dim columns for each query head
"""

from collections.abc import Callable
from dataclasses import dataclass

from megagrow.config import ModelShape
from megagrow.growth.maps import AxisMap, DimMap, GrowthStep, Role


@dataclass(frozen=True)
class Dim:
    """One dimension of a canonical tensor.

    Attributes:
        name: axis and role, for messages and for the growth record.
        size: returns its length in a model of a given shape.
        grow: returns its map in a growth step.
    """

    name: str
    size: Callable[[ModelShape], int]
    grow: Callable[[GrowthStep], DimMap]


def _hidden(role: Role) -> Dim:
    return Dim(f"hidden:{role.value}", lambda shape: shape.hidden_size, lambda step: step.hidden.dim(role))


def _fixed(name: str, size: Callable[[ModelShape], int]) -> Dim:
    return Dim(f"{name}:fixed", size, lambda step: AxisMap.unchanged(size(step.large)).dim(Role.FIXED))


def _shared(shape: ModelShape) -> int:
    return shape.moe_shared_expert_intermediate_size or 0


def _experts(shape: ModelShape) -> int:
    return shape.num_moe_experts or 0


def qkv_rows(step: GrowthStep) -> DimMap:
    """Return the map of the rows of linear_qkv, group by group."""
    small, large = step.small, step.large
    query = step.heads.head.dim(Role.WRITE)
    key = step.heads.group.dim(Role.WRITE)
    slots = small.heads_per_group + 2
    size = small.groups * slots
    parts: list[DimMap] = []
    for group in range(large.groups):
        heads = slice(group * large.heads_per_group, (group + 1) * large.heads_per_group)
        of_group, of_slot = divmod(query.source[heads], small.heads_per_group)
        parts.append(query.at(heads, of_group * slots + of_slot, size))
        one = slice(group, group + 1)
        for slot in (small.heads_per_group, small.heads_per_group + 1):
            parts.append(key.at(one, key.source[one] * slots + slot, size))
    return DimMap.concatenate(parts).spread(small.head_dim)


def glu_rows(axis: AxisMap) -> DimMap:
    """Return the map of the rows (gate, then up) of a gated linear_fc1 whose width grows as `axis`."""
    half = axis.dim(Role.WRITE)
    every, size = slice(None), 2 * half.size
    return DimMap.concatenate([half.at(every, half.source, size), half.at(every, half.source + half.size, size)])


def shared_width(step: GrowthStep) -> AxisMap:
    """Return the map of the shared expert's width, in a model that has one."""
    assert step.shared is not None
    return step.shared


def expert_axis(step: GrowthStep) -> AxisMap:
    """Return the map of the experts, in a mixture."""
    assert step.experts is not None
    return step.experts.expert


def head_columns(step: GrowthStep) -> DimMap:
    """Return the map of the columns of linear_proj."""
    return step.heads.head.dim(Role.READ).spread(step.small.head_dim)


HIDDEN_WRITE = _hidden(Role.WRITE)
HIDDEN_READ = _hidden(Role.READ)
HIDDEN_GAIN = _hidden(Role.GAIN)
HIDDEN_OFFSET = _hidden(Role.OFFSET)
FINAL_GAIN = _hidden(Role.FINAL_GAIN)
FINAL_OFFSET = _hidden(Role.FINAL_OFFSET)
FFN_WRITE = Dim("ffn:write", lambda shape: shape.mlp_width, lambda step: step.ffn.dim(Role.WRITE))
FFN_READ = Dim("ffn:read", lambda shape: shape.mlp_width, lambda step: step.ffn.dim(Role.READ))
GLU_ROWS = Dim("ffn:write (gate, up)", lambda shape: 2 * shape.mlp_width, lambda step: glu_rows(step.ffn))
SHARED_WRITE = Dim("shared:write", _shared, lambda step: shared_width(step).dim(Role.WRITE))
SHARED_READ = Dim("shared:read", _shared, lambda step: shared_width(step).dim(Role.READ))
SHARED_GLU_ROWS = Dim(
    "shared:write (gate, up)", lambda shape: 2 * _shared(shape), lambda step: glu_rows(shared_width(step))
)
EXPERT_WRITE = Dim("expert:write", _experts, lambda step: expert_axis(step).dim(Role.WRITE))
EXPERT_READ = Dim("expert:read", _experts, lambda step: expert_axis(step).dim(Role.READ))
ROUTER_ROWS = Dim("expert:router", _experts, lambda step: expert_axis(step).dim(Role.WRITE))
QKV_ROWS = Dim(
    "head and group:write (q.., k, v by group)",
    lambda shape: shape.groups * (shape.heads_per_group + 2) * shape.head_dim,
    qkv_rows,
)
HEAD_COLUMNS = Dim("head:read", lambda shape: shape.num_attention_heads * shape.head_dim, head_columns)
VOCAB_WRITE = Dim("vocab:write", lambda shape: shape.padded_vocab_size, lambda step: step.vocab.dim(Role.WRITE))
VOCAB_READ = Dim("vocab:read", lambda shape: shape.padded_vocab_size, lambda step: step.vocab.dim(Role.READ))
POSITIONS = _fixed("position", lambda shape: shape.positions)
HEAD_DIM = _fixed("head_dim", lambda shape: shape.head_dim)
