"""Decide for every argument in a checkpoint whether the model it describes is one that megagrow computes.

An argument of Megatron-LM is harmless, carried or refused (`classify_argument`). A *refused* one turns on a feature
that `ModelShape` cannot express; with any value but those that leave the feature off, the checkpoint is not read. An
argument that Megatron-LM does not have belongs to a fork. It is named in a note, and refused where its name speaks of
something that changes a function.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from megagrow.checkpoint.formats.megatron_common.known_arguments import HARMLESS
from megagrow.checkpoint.tensors import is_empty, note_on_unknown, refuse_suspects, short_text
from megagrow.errors import CheckpointError


class _Refused(NamedTuple):
    """An argument, the feature that it turns on, and the values with which the feature is off, besides empty ones."""

    name: str
    feature: str
    off: tuple[Any, ...] = ()


CARRIED = frozenset(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels
    seq_length max_position_embeddings normalization layernorm_epsilon norm_epsilon swiglu openai_gelu
    bias_gelu_fusion use_legacy_models use_mcore_models add_bias_linear disable_bias_linear add_qkv_bias
    untie_embeddings_and_output_weights qk_layernorm attention_dropout hidden_dropout init_method_std vocab_size
    padded_vocab_size make_vocab_size_divisible_by tokenizer_type position_embedding_type add_position_embedding
    use_rotary_position_embeddings rotary_base rotary_percent use_rope_scaling rope_scaling_factor num_experts
    moe_ffn_hidden_size moe_router_topk moe_aux_loss_coeff moe_shared_expert_intermediate_size moe_layer_freq
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size data_parallel_size
    sequence_parallel overlap_grad_reduce ddp_bucket_size ddp_num_buckets
    """.split()
)
"""Arguments that are read into the shape, the layout or the optimizer's buffers."""
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
REFUSED = {
    each.name: each
    for each in (
        _Refused("squared_relu", "squared ReLU"),
        _Refused("quick_geglu", "quick GEGLU"),
        _Refused("gated_linear_unit", "a gated MLP other than SwiGLU"),
        _Refused("activation_func", "another activation"),
        _Refused("glu_linear_offset", "an offset in the gated MLP"),
        _Refused("activation_func_clamp_value", "clamped activations"),
        _Refused("multi_latent_attention", "multi-latent attention"),
        _Refused("mtp_num_layers", "multi-token prediction"),
        _Refused("mtp_hybrid_override_pattern", "multi-token prediction"),
        _Refused("decoder_num_layers", "an encoder and a decoder"),
        _Refused("apply_layernorm_1p", "norm gains stored minus one"),
        _Refused("layernorm_zero_centered_gamma", "norm gains stored minus one"),
        _Refused("apply_residual_connection_post_layernorm", "residual connections taken after the norm"),
        _Refused("enable_mhc_connections", "several residual streams"),
        _Refused("rotary_interleaved", "interleaved rotary positions"),
        _Refused("rotary_seq_len_interpolation_factor", "interpolated rotary positions", (1,)),
        _Refused("rope_type", "another kind of rotary positions", ("rope",)),
        _Refused("mrope_section", "multimodal rotary positions"),
        _Refused("no_rope_freq", "layers without positional encoding"),
        _Refused("window_size", "sliding-window attention"),
        _Refused("softmax_type", "an unusual softmax in attention", ("vanilla",)),
        _Refused("softmax_scale", "another scale of attention than 1 / sqrt(head_dim)"),
        _Refused("attention_output_gate", "gated attention"),
        _Refused("qk_l2_norm", "L2-normalized queries and keys"),
        _Refused("export_qk_l2_norm", "L2-normalized queries and keys"),
        _Refused("experimental_attention_variant", "an experimental kind of attention"),
        _Refused("linear_attention_type", "linear attention"),
        _Refused("linear_attention_freq", "linear attention"),
        _Refused("heterogeneous_layers_config_path", "heterogeneous layers"),
        _Refused("heterogeneous_layers_config_encoded_json", "heterogeneous layers"),
        _Refused("heterogeneous_block_specs", "heterogeneous layers"),
        _Refused("per_block_parameters", "heterogeneous layers"),
        _Refused("hybrid_layer_pattern", "a hybrid of layer types"),
        _Refused("hybrid_override_pattern", "a hybrid of layer types"),
        _Refused("hybrid_attention_ratio", "a hybrid of layer types"),
        _Refused("hybrid_mlp_ratio", "a hybrid of layer types"),
        _Refused("is_hybrid_model", "a hybrid of layer types"),
        _Refused("retro_add_retriever", "retrieval"),
        _Refused("spec", "layers of a specification of its own", ("local",)),
        _Refused("enable_gpt_oss", "the layers of GPT-OSS"),
        _Refused("export_quant_cfg", "quantized weights", ("None", "none")),
        _Refused("export_real_quant_cfg", "quantized weights", ("None", "none")),
        _Refused("export_kv_cache_quant", "quantized keys and values", ("None", "none")),
        _Refused("export_num_medusa_heads", "heads that guess further tokens"),
        _Refused("export_num_eagle_layers", "layers that guess further tokens"),
        _Refused("export_num_mtp", "multi-token prediction"),
        _Refused("use_mup", "muP's multipliers"),
        _Refused("mup_base_hidden_size", "muP's multipliers"),
        _Refused("mup_base_head_dim", "muP's multipliers"),
        _Refused("mup_width_mult", "muP's multipliers", (1,)),
        _Refused("mup_embedding_mult", "muP's multipliers", (1,)),
        _Refused("mup_output_mult", "muP's multipliers", (1,)),
        _Refused("mup_attn_scale_power", "muP's multipliers", (1,)),
        _Refused("moe_router_pre_softmax", "a softmax before expert selection"),
        _Refused("moe_router_score_function", "expert selection other than by softmax", ("softmax",)),
        _Refused("moe_router_load_balancing_type", "a router that megagrow does not compute", _BALANCING),
        _Refused("moe_router_enable_expert_bias", "a bias in expert selection"),
        _Refused("moe_router_num_groups", "expert groups"),
        _Refused("moe_router_group_topk", "expert groups"),
        _Refused("moe_router_topk_limited_devices", "expert groups"),
        _Refused("moe_router_topk_scaling_factor", "scaled expert weights", (1,)),
        _Refused("moe_router_force_load_balancing", "random expert selection"),
        _Refused("moe_router_force_biased", "random expert selection"),
        _Refused("moe_input_jitter_eps", "noise in the router's input"),
        _Refused("moe_expert_capacity_factor", "experts that drop tokens"),
        _Refused("moe_expert_rank_capacity_factor", "experts that drop tokens"),
        _Refused("moe_token_dropping", "experts that drop tokens"),
        _Refused("moe_shared_expert_gate", "a gated shared expert"),
        _Refused("moe_latent_size", "latent-space experts"),
        _Refused("moe_apply_probs_on_input", "expert weights applied to the input"),
        _Refused("export_moe_apply_probs_on_input", "expert weights applied to the input"),
        _Refused("moe_mlp_glu_interleave_size", "interleaved halves of the gated MLP"),
        _Refused("moe_shared_expert_glu_interleave_size", "interleaved halves of the gated MLP"),
    )
}
"""Arguments that turn on features which `ModelShape` cannot express. Those of experts count only with experts."""
_ALSO_OFF: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "softmax_scale": lambda value, args: _is_default_scale(value, args),
    "gated_linear_unit": lambda value, args: bool(args.get("swiglu")),
    "activation_func": lambda value, args: str(value).endswith("silu" if args.get("swiglu") else ".gelu"),
    "window_size": lambda value, args: isinstance(value, list | tuple) and value[0] == -1 and value[1] in (-1, 0),
    "moe_expert_capacity_factor": lambda value, args: value < 0,  # Megatron-LM: no token is dropped
    "moe_expert_rank_capacity_factor": lambda value, args: value < 0,
}
"""Further values with which a feature is off, given the other arguments."""


def classify_argument(name: str) -> Literal["harmless", "carried", "refused"] | None:
    """Return the class of an argument of Megatron-LM; None for one that is unknown."""
    if name in CARRIED:
        return "carried"
    if name in REFUSED:
        return "refused"
    return "harmless" if any(name in names for names in HARMLESS.values()) else None


def check_arguments(args: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> None:
    """Raise CheckpointError if an argument turns on a feature that megagrow does not compute, or may do so.

    Args:
        args: by name, of the source.
        where: source of the arguments, for errors.
        ignored: unknown arguments that the user knows to be harmless.
    """
    found = [f"{each.feature} ({each.name}={short_text(args[each.name])})" for each in _turned_on(args)]
    if found:
        raise CheckpointError(f"{where}: not a model that megagrow supports: it has {', '.join(found)}")
    refuse_suspects(_unknown(args), args, where, "Megatron-LM's", ignored)


def argument_notes(args: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note that names the arguments which are not Megatron-LM's and have a value; none if there are none."""
    return note_on_unknown(_unknown(args), args, "argument", "Megatron-LM's")


def _turned_on(args: Mapping[str, Any]) -> list[_Refused]:
    """Return the refused arguments whose feature is on."""
    return [
        each
        for each in REFUSED.values()
        if (args.get("num_experts") or not each.name.startswith("moe_")) and not _is_off(each, args)
    ]


def _is_off(refused: _Refused, args: Mapping[str, Any]) -> bool:
    value = args.get(refused.name)
    if is_empty(value) or _all_in(value, refused.off):
        return True
    try:
        return refused.name in _ALSO_OFF and _ALSO_OFF[refused.name](value, args)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):  # not a value that Megatron-LM gives it
        return False


def _is_default_scale(value: float, args: Mapping[str, Any]) -> bool:
    head_dim = args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"]
    return bool(abs(value * head_dim**0.5 - 1) < 1e-6)


def _unknown(args: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that Megatron-LM does not have and whose value is not empty, sorted."""
    named = ((name, value) for name, value in args.items() if isinstance(name, str) and classify_argument(name) is None)
    return sorted(name for name, value in named if not is_empty(value))


def _all_in(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value, or each of a list, is one of the allowed ones."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(each in allowed for each in values)
