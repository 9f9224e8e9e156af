"""How many parameters a shape has, exactly, part by part.

Every matrix of the model is a product of a few widths, so the count is a sum of products. The names of the
parts are Megatron's modules. The vocabulary is counted padded, since those rows exist and are trained.
"""

import dataclasses

from megagrow.config import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by part, each summed over all layers; biases stand with the matrix that they belong to.

    `mlp` holds all experts of a mixture; `inactive` says how many of them a token does not meet, and is no part.
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
        """Parameters of the model; a tied output layer is counted once, as the embedding."""
        every: int = sum(getattr(self, field.name) for field in dataclasses.fields(self))
        return every - self.inactive

    @property
    def active(self) -> int:
        """Parameters that one token meets: in a mixture the chosen experts only."""
        return self.total - self.inactive

    @property
    def embeddings(self) -> int:
        """Tables of tokens and positions, with an untied output layer: what does not grow with depth."""
        return self.word_embeddings + self.position_embeddings + self.output_layer


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Return the exact count of a shape, equal to that of the Megatron-Core GPTModel that is built from it."""
    hidden, layers = shape.hidden_size, shape.num_layers
    query = shape.num_attention_heads * shape.head_dim
    qkv = query + 2 * shape.groups * shape.head_dim
    experts = shape.num_moe_experts or 0
    shared = shape.moe_shared_expert_intermediate_size or 0
    one_mlp = layers * _mlp(shape, shape.mlp_width)
    bias = int(shape.add_bias_linear)
    qkv_bias = int(shape.add_bias_linear or shape.add_qkv_bias)
    vectors_a_norm = 2 if shape.normalization == "LayerNorm" else 1
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
        norms=vectors_a_norm * (layers * normed + hidden),
        output_layer=0 if shape.tied else shape.padded_vocab_size * hidden,
        inactive=one_mlp * (experts - shape.moe_router_topk) if experts else 0,
    )


def _mlp(shape: ModelShape, width: int) -> int:
    """Parameters of one MLP of a width."""
    hidden, bias = shape.hidden_size, int(shape.add_bias_linear)
    return width * (2 if shape.swiglu else 1) * (hidden + bias) + hidden * (width + bias)


def budget_parameters(shape: ModelShape) -> float:
    """Return the N of the 6NT rule, of tokens per parameter and of learning-rate rules: nominal, else exact.

    Of a mixture of experts these are the active parameters: the ones whose products a token costs.
    """
    return shape.nominal_parameters or float(count_parameters(shape).active)
