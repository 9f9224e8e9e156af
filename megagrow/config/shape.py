"""The shape of a model, under Megatron's names.

A shape determines the parameters of a model and the function they compute: sizes, and kinds of norm, position
embedding and activation. The parallel layout and training settings are separate, so two checkpoints with equal
shapes are interchangeable whatever their layouts.
"""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from megagrow.config.base import Section


class ModelShape(Section):
    """A GPT, Llama-like by default, or GPT-like (LayerNorm, learned positions, GELU, biases). With
    num_moe_experts, the MLP of every layer is a mixture of experts.
    """

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0, description="width inside the MLP; for SwiGLU, of one of its two halves")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_query_groups: int | None = Field(None, gt=0, description="KV heads (GQA); default: num_attention_heads")
    kv_channels: int | None = Field(None, gt=0, description="head_dim; default: hidden_size / num_attention_heads")

    vocab_size: int = Field(gt=0, description="tokens of the tokenizer, without padding")
    make_vocab_size_divisible_by: int = Field(
        128, gt=0, description="pad the rows of the embedding to a multiple of this"
    )
    seq_length: int = Field(gt=0, description="tokens per sample")
    max_position_embeddings: int | None = Field(
        None, gt=0, description="rows of the learned position embedding; default: seq_length"
    )

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: float = Field(1e-5, gt=0)
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    rotary_base: int = Field(10000, gt=0)
    rotary_percent: float = Field(
        1.0, gt=0, le=1, description="share of the channels of each head, from the first, that is rotated"
    )
    rope_scaling_factor: float | None = Field(
        None,
        ge=1,
        description="Llama 3.1: divide low rotary frequencies by this factor; default: no scaling",
    )
    swiglu: bool = Field(True, description="gated MLP with SiLU; false: GELU")
    openai_gelu: bool = Field(False, description="tanh approximation of GELU, as in GPT-2; false: exact GELU")
    add_bias_linear: bool = False
    add_qkv_bias: bool = Field(False, description="biases for queries, keys and values only, as in Qwen2")
    untie_embeddings_and_output_weights: bool = True
    qk_layernorm: bool = False
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    init_method_std: float = Field(0.02, gt=0)

    num_moe_experts: int | None = Field(None, gt=0, description="experts per layer; default: a dense model")
    moe_ffn_hidden_size: int | None = Field(None, gt=0, description="width of an expert; default: ffn_hidden_size")
    moe_router_topk: int = Field(2, gt=1, description="experts per token; a softmax over them weights their outputs")
    moe_aux_loss_coeff: float = Field(1e-2, ge=0, description="weight of the load-balancing loss")
    moe_shared_expert_intermediate_size: int | None = Field(
        None, gt=0, description="width of a shared expert that sees every token; default: no such expert"
    )

    nominal_parameters: float | None = Field(
        None,
        gt=0,
        description="nominal size, such as 1e9 for '1B'; if set, 6NT budgets and the learning-rate rule use it",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}: "
                "set kv_channels (head_dim)"
            )
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_query_groups {self.groups} does not divide num_attention_heads {self.num_attention_heads}"
            )
        self._check_positions()
        if self.swiglu and self.openai_gelu:
            raise ValueError("openai_gelu true needs swiglu false")
        if self.add_bias_linear and self.add_qkv_bias:
            raise ValueError("add_bias_linear already includes the biases of add_qkv_bias: set one of them to false")
        self._check_experts()
        return self

    def _check_positions(self) -> None:
        """Raise ValueError if positions and heads do not fit together."""
        if self.position_embedding_type == "learned_absolute":
            if self.positions < self.seq_length:
                raise ValueError(f"max_position_embeddings {self.positions} is below seq_length {self.seq_length}")
            for name, default in (("rotary_percent", 1.0), ("rope_scaling_factor", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} {getattr(self, name)} needs position_embedding_type rope")
        elif self.head_dim % 2:
            raise ValueError(
                f"rope needs an even head_dim, not {self.head_dim} (kv_channels, or hidden_size / num_attention_heads)"
            )
        elif self.rotary_channels % 2 or not self.rotary_channels:
            raise ValueError(
                f"rotary_percent {self.rotary_percent} of head_dim {self.head_dim} is {self.rotary_channels} channels: "
                "rope needs an even number, at least 2"
            )

    def _check_experts(self) -> None:
        """Raise ValueError if the settings of experts do not fit together."""
        experts = self.num_moe_experts
        if experts is None:
            for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} {getattr(self, name)} needs num_moe_experts")
            return
        if self.moe_router_topk > experts:
            raise ValueError(f"moe_router_topk {self.moe_router_topk} is above num_moe_experts {experts}")
        if self.add_bias_linear:
            raise ValueError(f"num_moe_experts {experts} needs add_bias_linear false: experts have no biases")

    @property
    def groups(self) -> int:
        """Number of KV heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_channels(self) -> int:
        """Channels per head that rope rotates, rounded down."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.groups

    @property
    def mlp_width(self) -> int:
        """Width inside one MLP: of an expert in a mixture, otherwise ffn_hidden_size."""
        return (self.moe_ffn_hidden_size if self.num_moe_experts else None) or self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. It does not depend on the layout, so a checkpoint can move between layouts."""
        multiple = self.make_vocab_size_divisible_by
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def positions(self) -> int:
        """Rows of the learned position embedding."""
        return self.max_position_embeddings or self.seq_length

    @property
    def tied(self) -> bool:
        """Whether the output layer shares the weights of the embedding."""
        return not self.untie_embeddings_and_output_weights
