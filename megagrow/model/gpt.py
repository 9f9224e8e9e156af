"""Builds Megatron-Core's `GPTModel` from a shape and a layout, one chunk per virtual pipeline stage of this rank.

A shape is translated to Megatron-Core's settings only in `transformer_config`, and only `_Kernels` looks at what is
installed. Weights are initialized to NaN: the caller fills them (from a generator that does not depend on the layout,
or from a checkpoint), and a tensor left unfilled makes the loss NaN at step 0.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import ConfigError
from megagrow.model.activation import SwiGlu, gelu_tanh
from megagrow.model.attention import CausalAttention, Rotary
from megagrow.model.norm import Norm

TrainingPrecision = Literal["bf16", "fp32"]
Recompute = Literal["full", "selective"]


@dataclass(frozen=True)
class _Kernels:
    """Capabilities of this machine: CUDA, `fused` layers (Transformer Engine), weight gradients added in place."""

    cuda: bool
    fused: bool
    accumulates: bool

    @classmethod
    def detect(cls) -> "_Kernels":
        cuda = torch.cuda.is_available()
        fused = cuda and importlib.util.find_spec("transformer_engine") is not None
        return cls(cuda, fused, bool(layers._grad_accum_fusion_available))


def build_model(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    precision: TrainingPrecision = "bf16",
    recompute: Recompute | None = None,
    accumulate_in_place: bool = True,
) -> list[GPTModel]:
    """Return this rank's model chunks, first to last, on its device; `megagrow.runtime.start` must have run.

    A chunk is called as `chunk(tokens [b,s], position_ids [b,s], None, labels=[b,s])`. On the last pipeline stage it
    returns losses in nats [b,s], or without labels logits [b,s,vocabulary / tensor ranks]. All weights are NaN until
    they are filled. `accumulate_in_place` lets linear layers add weight gradients straight into `main_grad`, where
    this machine can: faster under Megatron-Core's DDP, impossible without it. ConfigError where this machine does not
    support the layout.
    """
    config = transformer_config(
        shape, layout, precision=precision, recompute=recompute, accumulate_in_place=accumulate_in_place
    )
    virtual = layout.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else list(range(virtual))
    return [_build_chunk(shape, config, stage) for stage in stages]


def transformer_config(
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    precision: TrainingPrecision = "bf16",
    recompute: Recompute | None = None,
    accumulate_in_place: bool = True,
) -> TransformerConfig:
    """Return Megatron-Core's configuration for a shape in a layout on this machine."""
    kernels = _Kernels.detect()
    _check_context(layout, kernels)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        normalization=shape.normalization,
        layernorm_epsilon=shape.layernorm_epsilon,
        gated_linear_unit=shape.swiglu,
        activation_func=_activation(shape),
        add_bias_linear=shape.add_bias_linear,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        attention_dropout=shape.attention_dropout,
        hidden_dropout=shape.hidden_dropout,
        # perform_initialization=False would build even faster, but Megatron-Core marks a weight as sharded over tensor
        # ranks only while initializing it, and without that mark the gradient norm leaves it out.
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        embedding_init_method=_leave_unfilled,
        # Interleaved with batched p2p, two ranks exchange two tensors each way in one batch, which get mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # Fused means compiled by torch: on CPU this takes a minute before the first step and makes no step faster.
        bias_dropout_fusion=kernels.cuda,
        # SwiGLU only: Megatron-Core's fused GELU is always the tanh approximation, also where GELU is configured.
        bias_activation_fusion=kernels.fused and shape.swiglu,
        # Despite its name, this option lets the layer spec set the activation: our SwiGlu.
        use_te_activation_func=shape.swiglu and not kernels.fused,
        apply_rope_fusion=kernels.fused and shape.position_embedding_type == "rope",
        masked_softmax_fusion=False,
        persist_layer_norm=kernels.fused,
        gradient_accumulation_fusion=kernels.accumulates and accumulate_in_place,
        **_parallel_settings(layout) | _recompute_settings(recompute) | _expert_settings(shape, kernels, precision),
    )


def _parallel_settings(layout: ParallelLayout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
        "num_layers_in_first_pipeline_stage": layout.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": layout.decoder_last_pipeline_num_layers,
        "account_for_embedding_in_pipeline_split": layout.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": layout.account_for_loss_in_pipeline_split,
        "pipeline_model_parallel_layout": layout.pipeline_model_parallel_layout,
    }


def _check_context(layout: ParallelLayout, kernels: _Kernels) -> None:
    if layout.context_parallel_size > 1 and not kernels.fused:
        raise ConfigError(
            f"context_parallel_size {layout.context_parallel_size} needs transformer-engine and CUDA; "
            "set it to 1 or install megagrow[gpu]"
        )


class ModelChunk(GPTModel):  # type: ignore[misc]  # Megatron's class is untyped
    """Megatron-Core's GPT, with torch's cross entropy where the vocabulary is not sharded.

    The vocabulary-parallel one makes twice as many passes over the logits and three collectives per micro-batch.
    """

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels [b,s], logits [s,b,v] -> losses in nats [b,s], fp32."""
        if self.config.tensor_model_parallel_size > 1:
            loss_BS: torch.Tensor = super().compute_language_model_loss(labels, logits)
            return loss_BS
        loss_SB = F.cross_entropy(logits.flatten(0, 1).float(), labels.t().flatten(), reduction="none")
        return loss_SB.view(logits.shape[:2]).t().contiguous()


def _leave_unfilled(weight: torch.Tensor) -> torch.Tensor:
    """Initialize nothing: `build_model` sets every weight to NaN, and its caller fills them."""
    return weight


def _recompute_settings(recompute: Recompute | None) -> dict[str, object]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _expert_settings(shape: ModelShape, kernels: _Kernels, precision: TrainingPrecision) -> dict[str, object]:
    if shape.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_ffn_hidden_size": shape.mlp_width,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": shape.moe_aux_loss_coeff,
        # In bf16, router rows with small differences would select experts at random.
        "moe_router_dtype": "fp32" if precision == "bf16" else None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": kernels.fused,
    }


def _build_chunk(shape: ModelShape, config: TransformerConfig, stage: int | None) -> GPTModel:
    kernels = _Kernels.detect()
    whole_rank = stage is None
    chunk = ModelChunk(
        config,
        _layer_specs(shape, config, stage, kernels),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=whole_rank, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=whole_rank, vp_stage=stage),
        share_embeddings_and_output_weights=shape.tied,
        # Without fused layers our attention applies rotary positions, so Megatron-Core gets none.
        position_embedding_type=_position_embedding(shape, kernels),
        rotary_base=shape.rotary_base,
        rotary_percent=shape.rotary_percent,
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        vp_stage=stage,
    )
    # Learned positions are a plain nn.Embedding, created on CPU in fp32 regardless of the configuration.
    chunk.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))
    return chunk


def _activation(shape: ModelShape) -> Callable[[torch.Tensor], torch.Tensor]:
    if shape.swiglu:
        return F.silu
    return gelu_tanh if shape.openai_gelu else F.gelu


def _position_embedding(shape: ModelShape, kernels: _Kernels) -> str:
    if shape.position_embedding_type == "rope" and not kernels.fused:
        return "none"
    return shape.position_embedding_type


def _layer_specs(
    shape: ModelShape, config: TransformerConfig, stage: int | None, kernels: _Kernels
) -> TransformerBlockSubmodules | ModuleSpec:
    experts = shape.num_moe_experts
    if kernels.fused:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=shape.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=shape.qk_layernorm, normalization=shape.normalization
    )
    rotary = None
    if shape.position_embedding_type == "rope":
        rotary = Rotary(shape.rotary_channels, shape.rotary_base, shape.rope_scaling_factor)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    mlp = layer.submodules.mlp.submodules
    if experts is not None:
        # Transformer Engine fuses this norm only into a dense MLP; the local layer's key map would also rename it here.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    if config.use_te_activation_func:
        for each in (mlp,) if experts is None else (mlp.experts.submodules, mlp.shared_experts.submodules):
            each.activation_func = SwiGlu
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=CausalAttention, params={"rotary": rotary})
    if shape.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    count = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)
