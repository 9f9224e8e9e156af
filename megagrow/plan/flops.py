"""How many FLOPs training spends per token.

Only matrix products are counted, with a multiply-add as 2. The backward pass costs twice the forward pass, so
training costs 3 times forward: 6 FLOPs per matrix weight. Attention, which has no weights, is added: with a causal
mask, a token attends to half of the sequence on average, and only that half is counted (S/2 keys per query, as in
Megatron-LM's own FLOPs counter; the kernels we use skip the other half).
These are *model* FLOPs: recomputed activations are not counted, and neither are norms, softmax and activation
functions, whose cost is linear in the widths. Embedding look-ups cost nothing; the output layer is counted with its
padded vocabulary, tied or not. In a mixture, a token pays for the router and for its chosen and shared experts.
"""

import dataclasses

from megagrow.config import ModelShape
from megagrow.plan.parameters import budget_parameters

_TRAINING = 3  # forward once, backward for activations, backward for weights
_MULTIPLY_ADD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Training FLOPs per token by part, each summed over all layers."""

    linear_qkv: int
    attention: int
    linear_proj: int
    mlp: int
    router: int
    output_layer: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def flops_per_token(shape: ModelShape) -> FlopsPerToken:
    """Return the exact training FLOPs per token in a full sequence of `seq_length`, counting the causal half."""
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
        # Scores and values each multiply S/2 keys by all query channels; the two halves add up to one S.
        attention=weight * layers * shape.seq_length * query,
        linear_proj=weight * layers * query * hidden,
        mlp=weight * layers * matrices_of_mlp * hidden * width,
        router=weight * layers * hidden * experts,
        output_layer=weight * hidden * shape.padded_vocab_size,
    )


def six_n(shape: ModelShape) -> float:
    """Return the training FLOPs per token by the 6NT rule, with the nominal N if the shape has one."""
    return 6.0 * budget_parameters(shape)
