"""How many parameters a shape has, exactly, part by part.

Every matrix of the model is a product of a few widths, so the count is a sum of products. The names of the
parts are Megatron's modules. The vocabulary is counted padded, since those rows exist and are trained.
"""

import dataclasses

from megagrow.config import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by part, each summed over all layers; biases stand with the matrix that they belong to."""

    word_embeddings: int
    position_embeddings: int
    linear_qkv: int
    linear_proj: int
    mlp: int
    norms: int
    output_layer: int

    @property
    def total(self) -> int:
        """Parameters of the model; a tied output layer is counted once, as the embedding."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def embeddings(self) -> int:
        """Tables of tokens and positions, with an untied output layer: what does not grow with depth."""
        return self.word_embeddings + self.position_embeddings + self.output_layer


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Return the exact count of a shape, equal to that of the Megatron-Core GPTModel that is built from it."""
    hidden, ffn, layers = shape.hidden_size, shape.ffn_hidden_size, shape.num_layers
    query = shape.num_attention_heads * shape.head_dim
    qkv = query + 2 * shape.groups * shape.head_dim
    fc1 = ffn * (2 if shape.swiglu else 1)
    bias = int(shape.add_bias_linear)
    vectors_a_norm = 2 if shape.normalization == "LayerNorm" else 1
    normed = 2 * hidden + (2 * shape.head_dim if shape.qk_layernorm else 0)
    learned = shape.position_embedding_type == "learned_absolute"
    return ParameterCount(
        word_embeddings=shape.padded_vocab_size * hidden,
        position_embeddings=shape.positions * hidden if learned else 0,
        linear_qkv=layers * qkv * (hidden + bias),
        linear_proj=layers * hidden * (query + bias),
        mlp=layers * (fc1 * (hidden + bias) + hidden * (ffn + bias)),
        norms=vectors_a_norm * (layers * normed + hidden),
        output_layer=0 if shape.tied else shape.padded_vocab_size * hidden,
    )


def budget_parameters(shape: ModelShape) -> float:
    """Return the N of the 6NT rule, of tokens per parameter and of learning-rate rules: nominal, else exact."""
    return shape.nominal_parameters or float(count_parameters(shape).total)
