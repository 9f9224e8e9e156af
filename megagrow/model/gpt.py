"""From a shape and a layout to Megatron-Core's `GPTModel`: one chunk a virtual pipeline stage of this rank.

Everything that a shape says is translated once, in `transformer_config`, and everything that depends on what is
installed is decided once, in `_Kernels`. Weights come out as NaN: they are filled by whoever owns them (a
generator that does not depend on the layout, or a checkpoint), and a tensor that nobody filled shows at step 0.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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

Precision = Literal["bf16", "fp32"]
Recompute = Literal["full", "selective"]


@dataclass(frozen=True)
class _Kernels:
    """What this machine has: `cuda` at all, `fused` layers (Transformer Engine), weight gradients added in place."""

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
    precision: Precision = "bf16",
    recompute: Recompute | None = None,
    accumulate_in_place: bool = True,
) -> list[GPTModel]:
    """Return this rank's model chunks, first to last, on its device; `megagrow.runtime.start` must have run.

    A chunk is called as `chunk(tokens [b,s], position_ids [b,s], None, labels=[b,s])` and gives losses in nats
    [b,s] on the last stage; without labels logits [b,s,vocabulary / tensor ranks]. All weights are NaN until they
    are filled. `accumulate_in_place` lets linear layers add weight gradients straight into `main_grad`, where
    this machine can: wanted under Megatron-Core's DDP, impossible without it. ConfigError where the layout needs
    what this machine lacks.
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
    precision: Precision = "bf16",
    recompute: Recompute | None = None,
    accumulate_in_place: bool = True,
) -> TransformerConfig:
    """Return Megatron-Core's configuration of a shape in a layout on this machine."""
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
        # perform_initialization=False would build faster still, but Megatron-Core marks a weight as cut over tensor
        # ranks only while it initializes it, and the gradient norm leaves out weights without that mark.
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        embedding_init_method=_leave_unfilled,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        # Interleaved with batched p2p, two ranks exchange two tensors each way in one batch: they get mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # Fused means compiled by torch detect: a minute on CPU before the first step, and no faster after it.
        bias_dropout_fusion=kernels.cuda,
        # Megatron-Core's fused GELU is the tanh approximation whichever is asked for: SwiGLU only.
        bias_activation_fusion=kernels.fused and shape.swiglu,
        # The name is Transformer Engine's; what it does is to let the layer spec name the activation: our SwiGlu.
        use_te_activation_func=shape.swiglu and not kernels.fused,
        apply_rope_fusion=kernels.fused and shape.position_embedding_type == "rope",
        masked_softmax_fusion=False,
        persist_layer_norm=kernels.fused,
        gradient_accumulation_fusion=kernels.accumulates and accumulate_in_place,
        **_recompute_settings(recompute) | _expert_settings(shape, kernels, precision),
    )


def _check_context(layout: ParallelLayout, kernels: _Kernels) -> None:
    if layout.context_parallel_size > 1 and not kernels.fused:
        raise ConfigError(
            f"context_parallel_size {layout.context_parallel_size} needs transformer-engine and CUDA; "
            "set it to 1 or install megagrow[gpu]"
        )


class ModelChunk(GPTModel):
    """Megatron-Core's GPT with torch's cross entropy where no vocabulary is cut, which is all a small run has.

    The vocabulary-parallel one goes over the logits twice as often and calls three collectives a micro-batch.
    """

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels [b,s], logits [s,b,v] -> losses in nats [b,s], fp32."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        loss_SB = F.cross_entropy(logits.flatten(0, 1).float(), labels.t().flatten(), reduction="none")
        return loss_SB.view(logits.shape[:2]).t().contiguous()


def _leave_unfilled(weight: torch.Tensor) -> torch.Tensor:
    """Initialize nothing: `build_model` marks every weight as unfilled, and their owner fills them."""
    return weight


def _recompute_settings(recompute: Recompute | None) -> dict[str, object]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _expert_settings(shape: ModelShape, kernels: _Kernels, precision: Precision) -> dict[str, object]:
    if shape.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_ffn_hidden_size": shape.mlp_width,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": shape.moe_aux_loss_coeff,
        # In bf16 a router's rows that differ by little would choose at random.
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
        # Without fused layers the rotation is our attention's work, and Megatron-Core is told of no positions.
        position_embedding_type=_position_embedding(shape, kernels),
        rotary_base=shape.rotary_base,
        rotary_percent=shape.rotary_percent,
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        vp_stage=stage,
    )
    # Learned positions are a plain nn.Embedding: they start on CPU in fp32 whatever the configuration says.
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
        # Transformer Engine fuses this norm into a dense MLP only; the local layer would name it as fused detect too.
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
