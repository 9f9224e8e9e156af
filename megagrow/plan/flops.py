"""How many FLOPs training spends on one token.

Only matrix products are counted, a multiply-add as 2. The backward pass costs twice the forward pass, so training
is 3 times forward: 6 FLOPs for each weight of a matrix. To that comes attention, which has no weights: with a
causal mask a token meets half of the sequence on average, and just that half is counted (S/2 keys a query, the
convention of Megatron-LM's own FLOPs counter too; the kernels that we use skip the other half).
These are *model* FLOPs: activations that are recomputed are not counted, and norms, softmax and activations,
which are linear in the widths, are left out. Embedding look-ups multiply nothing; the output layer is counted
with its padded vocabulary, tied or not. In a mixture a token pays for the router, its chosen and shared experts.
"""

import dataclasses

from megagrow.config import ModelShape
from megagrow.plan.parameters import budget_parameters

_TRAINING = 3  # forward once, backward for activations, backward for weights
_MULTIPLY_ADD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Training FLOPs on one token, by part, each summed over all layers."""

    linear_qkv: int
    attention: int
    linear_proj: int
    mlp: int
    router: int
    output_layer: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def flops_per_token(shape: ModelShape) -> FlopsPerToken:
    """Return the exact training FLOPs of a token in a full sequence of `seq_length`, causal half counted."""
    hidden, layers = shape.hidden_size, shape.num_layers
    query = shape.num_attention_heads * shape.head_dim
    key_value = 2 * shape.groups * shape.head_dim
    matrices_of_mlp = 3 if shape.swiglu else 2
    experts = shape.num_moe_experts or 0
    width = shape.mlp_width * (shape.moe_router_topk if experts else 1)
    width += shape.moe_shared_expert_intermediate_size or 0
    weight = _TRAINING * _MULTIPLY_ADD
    return FlopsPerToken(
        linear_qkv=weight * layers * hidden * (query + key_value),
        # Scores and values are each S/2 keys times all query channels; 2 products of half the length make one S.
        attention=weight * layers * shape.seq_length * query,
        linear_proj=weight * layers * query * hidden,
        mlp=weight * layers * matrices_of_mlp * hidden * width,
        router=weight * layers * hidden * experts,
        output_layer=weight * hidden * shape.padded_vocab_size,
    )


def six_n(shape: ModelShape) -> float:
    """Return training FLOPs of a token by the 6NT rule, with the nominal N where the shape gives one."""
    return 6.0 * budget_parameters(shape)
