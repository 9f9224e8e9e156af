"""The shape of a model, under Megatron's names.

A shape says all that determines the parameters of a model and the function that they compute: sizes, kinds of
norm, position and activation. How it is cut over processes and trained is said elsewhere, so two checkpoints
with equal shapes are interchangeable whatever their layouts.
"""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from megagrow.config.base import Section


class ModelShape(Section):
    """A GPT: Llama-like (the defaults) or GPT-like (LayerNorm, learned positions, GELU, biases); with
    num_moe_experts every layer's MLP is a mixture of experts.
    """

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0, description="width inside the MLP; for SwiGLU that of one of the two halves")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_query_groups: int | None = Field(None, gt=0, description="KV heads (GQA); default: num_attention_heads")
    kv_channels: int | None = Field(None, gt=0, description="head_dim; default: hidden_size / num_attention_heads")

    vocab_size: int = Field(gt=0, description="tokens of the tokenizer, before padding")
    make_vocab_size_divisible_by: int = Field(
        128, gt=0, description="rows of the embedding are padded to this multiple"
    )
    seq_length: int = Field(gt=0, description="tokens a sample")
    max_position_embeddings: int | None = Field(
        None, gt=0, description="rows of learned positions; default: seq_length"
    )

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: float = Field(1e-5, gt=0)
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: int = Field(10000, gt=0)
    rotary_percent: float = Field(1.0, gt=0, le=1, description="share of each head that is rotated, its first channels")
    rope_scaling_factor: float | None = Field(
        None,
        ge=1,
        description="Llama 3.1: slow rotary frequencies are divided by this; default: they are not",
    )
    swiglu: bool = Field(True, description="gated MLP with SiLU; false: GELU")
    openai_gelu: bool = Field(False, description="GELU by its tanh approximation, as in GPT-2; false: exact, by erf")
    add_bias_linear: bool = False
    add_qkv_bias: bool = Field(False, description="biases of queries, keys and values only, as in Qwen2")
    untie_embeddings_and_output_weights: bool = True
    qk_layernorm: bool = False
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    init_method_std: float = Field(0.02, gt=0)

    num_moe_experts: int | None = Field(None, gt=0, description="experts in every layer; default: a dense model")
    moe_ffn_hidden_size: int | None = Field(None, gt=0, description="width of an expert; default: ffn_hidden_size")
    moe_router_topk: int = Field(2, gt=1, description="experts a token; their weights add up to 1 (softmax over them)")
    moe_aux_loss_coeff: float = Field(1e-2, ge=0, description="weight of the load-balancing loss")
    moe_shared_expert_intermediate_size: int | None = Field(
        None, gt=0, description="width of an expert that sees every token; default: there is none"
    )

    nominal_parameters: float | None = Field(
        None, gt=0, description="the round number people say (1e9 for '1B'); budgets by 6NT use it when given"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}: "
                "give kv_channels (head_dim) as well"
            )
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_query_groups {self.groups} does not divide num_attention_heads {self.num_attention_heads}"
            )
        self._check_positions()
        if self.swiglu and self.openai_gelu:
            raise ValueError("openai_gelu needs a GELU: set swiglu to false")
        if self.add_bias_linear and self.add_qkv_bias:
            raise ValueError("add_bias_linear has the biases of add_qkv_bias already: set one of the two to false")
        self._check_experts()
        return self

    def _check_positions(self) -> None:
        """Raise ValueError where positions and heads do not fit together."""
        if self.position_embedding_type == "learned_absolute":
            if self.positions < self.seq_length:
                raise ValueError(f"max_position_embeddings {self.positions} is below seq_length {self.seq_length}")
            for name, default in (("rotary_percent", 1.0), ("rope_scaling_factor", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} {getattr(self, name)} needs position_embedding_type rope")
        elif self.head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, not {self.head_dim} (hidden_size / num_attention_heads)")
        elif self.rotary_channels % 2 or not self.rotary_channels:
            raise ValueError(
                f"rotary_percent {self.rotary_percent} of head_dim {self.head_dim} is {self.rotary_channels} channels: "
                "rope needs an even number of them, at least 2"
            )

    def _check_experts(self) -> None:
        """Raise ValueError where the experts do not fit together."""
        experts = self.num_moe_experts
        if experts is None:
            for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} {getattr(self, name)} needs num_moe_experts")
            return
        if self.moe_router_topk > experts:
            raise ValueError(f"moe_router_topk {self.moe_router_topk} is above num_moe_experts {experts}")
        if self.add_bias_linear:
            raise ValueError(f"num_moe_experts {experts} with add_bias_linear: experts have no biases; set it to false")

    @property
    def groups(self) -> int:
        """KV heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rope rotates, rounded down."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.groups

    @property
    def mlp_width(self) -> int:
        """Width inside one MLP: that of an expert in a mixture, else ffn_hidden_size."""
        return (self.moe_ffn_hidden_size if self.num_moe_experts else None) or self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the same for every layout, so that a checkpoint moves freely between them."""
        multiple = self.make_vocab_size_divisible_by
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def positions(self) -> int:
        """Rows of the learned position embedding."""
        return self.max_position_embeddings or self.seq_length

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return not self.untie_embeddings_and_output_weights
