"""The exact parameter count of a shape, part by part.

The size of every matrix is a product of a few widths, so the count is a sum of products. The parts are named after
Megatron's modules. The vocabulary is counted with its padding, since those rows exist and are trained.
"""

import dataclasses

from megagrow.config import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by part, each summed over all layers; a bias is counted with its matrix.

    `mlp` includes all experts of a mixture. `inactive` counts those of its parameters that a token does not use, and
    is not a part itself.
    """

    word_embeddings: int
    position_embeddings: int
    linear_qkv: int
    linear_proj: int
    mlp: int
    router: int
    shared_experts: int
    norms: int
    output_layer: int
    inactive: int

    @property
    def total(self) -> int:
        """Parameters of the model; a tied output layer is counted once, as part of the embedding."""
        fields: int = sum(getattr(self, field.name) for field in dataclasses.fields(self))
        return fields - self.inactive

    @property
    def active(self) -> int:
        """Parameters that one token uses: of the experts in a mixture, only the chosen ones."""
        return self.total - self.inactive

    @property
    def embeddings(self) -> int:
        """Token and position embeddings and an untied output layer: the part that does not grow with depth."""
        return self.word_embeddings + self.position_embeddings + self.output_layer


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Return the exact count of a shape, equal to that of a Megatron-Core GPTModel built from it."""
    hidden, layers = shape.hidden_size, shape.num_layers
    query = shape.num_attention_heads * shape.head_dim
    qkv = query + 2 * shape.groups * shape.head_dim
    experts = shape.num_moe_experts or 0
    shared = shape.moe_shared_expert_intermediate_size or 0
    one_mlp = layers * _mlp(shape, shape.mlp_width)
    bias = int(shape.add_bias_linear)
    qkv_bias = int(shape.add_bias_linear or shape.add_qkv_bias)
    vectors_per_norm = 2 if shape.normalization == "LayerNorm" else 1
    normed = 2 * hidden + (2 * shape.head_dim if shape.qk_layernorm else 0)
    learned = shape.position_embedding_type == "learned_absolute"
    return ParameterCount(
        word_embeddings=shape.padded_vocab_size * hidden,
        position_embeddings=shape.positions * hidden if learned else 0,
        linear_qkv=layers * qkv * (hidden + qkv_bias),
        linear_proj=layers * hidden * (query + bias),
        mlp=one_mlp * (experts or 1),
        router=layers * experts * hidden,
        shared_experts=layers * _mlp(shape, shared) if shared else 0,
        norms=vectors_per_norm * (layers * normed + hidden),
        output_layer=0 if shape.tied else shape.padded_vocab_size * hidden,
        inactive=one_mlp * (experts - shape.moe_router_topk) if experts else 0,
    )


def _mlp(shape: ModelShape, width: int) -> int:
    """Parameters of one MLP of the given width."""
    hidden, bias = shape.hidden_size, int(shape.add_bias_linear)
    return width * (2 if shape.swiglu else 1) * (hidden + bias) + hidden * (width + bias)


def budget_parameters(shape: ModelShape) -> float:
    """Return the N of the 6NT rule, tokens_per_parameter and the learning-rate rule: nominal, otherwise exact.

    For a mixture of experts, N counts active parameters, those whose products a token pays for.
    """
    return shape.nominal_parameters or float(count_parameters(shape).active)
