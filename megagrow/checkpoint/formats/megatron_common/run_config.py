"""The run_config.yaml that Megatron-Bridge writes into its checkpoints, as the arguments that Megatron-LM would save.

Its section `model` has the fields of Megatron-Core's TransformerConfig and of Megatron-Bridge's model provider. Most
have the name of an argument and are passed on, so that the same rules apply to them; the others are translated. The
file is a dump of everything, so a field that decides the function and is missing is an error and has no default.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megagrow.errors import CheckpointError

RUN_CONFIG = "run_config.yaml"
_MAX_BYTES = 1 << 20
_REQUIRED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size", "seq_length", "normalization",
    "layernorm_epsilon", "position_embedding_type", "gated_linear_unit", "activation_func", "add_bias_linear",
    "share_embeddings_and_output_weights",
)  # fmt: skip
_REQUIRED_BY_ROPE = ("rotary_base", "rotary_percent")
_CLASSES = re.compile(r"^(?:GPT|BridgeGPT|Llama\w*?|Qwen2\d*|Qwen25|Qwen3(?:Mo[Ee])?|Mistral)Model(?:Provider|Config)")
"""Classes that build Megatron-Core's GPTModel as its fields say; others, such as Gemma's, compute more."""
_TANH_GELU = ("openai_gelu", "fast_gelu")
_TRANSLATED = (
    "_target_", "_builder_", "gated_linear_unit", "activation_func", "share_embeddings_and_output_weights",
    "layernorm_zero_centered_gamma", "num_moe_experts", "should_pad_vocab", "rope_scaling", "scale_factor",
    "low_freq_factor", "high_freq_factor", "old_context_len", "seq_len_interpolation_factor", "bias_activation_fusion",
    "scatter_embedding_sequence_parallel", "transformer",
)  # fmt: skip
"""Fields that are not arguments: translated, or without a part in the function."""
_LLAMA_31 = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
"""The other constants of Llama 3.1's scaling, which Megatron-Core does not let anyone change."""


def run_config_arguments(path: Path) -> dict[str, Any] | None:
    """Return the arguments that a run_config.yaml in a checkpoint's directory, or next to it, amounts to.

    Returns:
        The arguments by Megatron-LM's names; None if there is no such file.

    Raises:
        CheckpointError: the file is damaged, incomplete, or describes a model that megagrow does not compute.
    """
    file = next((each for each in (path / RUN_CONFIG, path.absolute().parent / RUN_CONFIG) if each.is_file()), None)
    if file is None:
        return None
    if file.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{file}: refused: {file.stat().st_size} bytes are too many for a {RUN_CONFIG}")
    text = file.read_bytes()
    if b"<<" in text:  # merge keys can make a small file explode, and Megatron-Bridge writes none
        raise CheckpointError(f"{file}: refused: it has YAML merge keys (<<), which Megatron-Bridge does not write")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {' '.join(str(error).split())[:200]}") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: has no section `model`, so it does not describe the checkpoint's model")
    nested = model.get("transformer")
    try:
        return _arguments({**nested, **model} if isinstance(nested, dict) else model, str(file))
    except (TypeError, ValueError, AttributeError) as error:  # a value of another type than Megatron-Bridge writes
        raise CheckpointError(f"{file}: damaged: {' '.join(str(error).split())[:200]}") from None


def _arguments(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    _check_complete(model, where)
    arguments = {name: value for name, value in model.items() if name not in _TRANSLATED and _is_plain(value)}
    experts, heads = model.get("num_moe_experts"), model["num_attention_heads"]
    arguments |= {
        "num_experts": experts,
        "num_query_groups": model.get("num_query_groups") or heads,
        "group_query_attention": True,
        "padded_vocab_size": _padded_vocabulary(model),
        "norm_epsilon": model["layernorm_epsilon"],
        "untie_embeddings_and_output_weights": not model["share_embeddings_and_output_weights"],
        "apply_layernorm_1p": model.get("layernorm_zero_centered_gamma", False),
        "rotary_seq_len_interpolation_factor": model.get("seq_len_interpolation_factor"),
        "max_position_embeddings": model["seq_length"],
        **_activation(model, where),
        **_rope_scaling(model, where),
    }
    return arguments


def _check_complete(model: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if the model's class computes more than its fields say, or a field is missing."""
    target = str(model.get("_target_") or "GPTModelProvider").rpartition(".")[2]
    if not _CLASSES.match(target):
        raise CheckpointError(
            f"{where}: model._target_ is {target}, whose function may differ from that of Megatron-Core's plain GPT; "
            "supported are the classes of GPT, Llama, Qwen2, Qwen3 and Mistral"
        )
    required = _REQUIRED + (_REQUIRED_BY_ROPE if model.get("position_embedding_type") == "rope" else ())
    if missing := [f"model.{name}" for name in required if model.get(name) is None]:
        raise CheckpointError(f"{where}: missing {', '.join(missing)}; they decide the function and have no default")


def _activation(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The activation as arguments. It is stored by name, or as a section that names the function."""
    function, gated = model["activation_func"], bool(model["gated_linear_unit"])
    name = str(function.get("_target_") if isinstance(function, dict) else function).rpartition(".")[2]
    if gated and name in ("silu", "swish"):
        return {"swiglu": True, "openai_gelu": False}
    if not gated and name in ("gelu", *_TANH_GELU):
        # Megatron-Core's fusion of bias and GELU uses the tanh approximation
        fused = bool(model.get("bias_activation_fusion", False))
        return {"swiglu": False, "openai_gelu": name in _TANH_GELU, "bias_gelu_fusion": fused}
    raise CheckpointError(
        f"{where}: activation_func is {name} {'with' if gated else 'without'} a gate; supported are silu with a gate "
        "and gelu without one"
    )


def _rope_scaling(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Llama 3.1's scaling as arguments: `rope_scaling`, or `scale_factor` of the classes of earlier versions."""
    if model.get("scale_factor") is None:
        scaled = bool(model.get("rope_scaling", False))
        if scaled and model.get("rope_scaling_factor") is None:
            raise CheckpointError(f"{where}: missing model.rope_scaling_factor; rope_scaling has no default factor")
        return {"use_rope_scaling": scaled, "rope_scaling_factor": model.get("rope_scaling_factor") or 1.0}
    for name, constant in _LLAMA_31.items():
        if model.get(name) != constant:
            raise CheckpointError(f"{where}: {name} is {model.get(name)}: only {constant} is supported")
    return {"use_rope_scaling": True, "rope_scaling_factor": float(model["scale_factor"])}


def _padded_vocabulary(model: Mapping[str, Any]) -> int:
    """Rows of the embedding."""
    tokens: int = model["vocab_size"]
    if not model.get("should_pad_vocab", False):
        return tokens
    multiple = (model.get("make_vocab_size_divisible_by") or 1) * (model.get("tensor_model_parallel_size") or 1)
    return -(-tokens // multiple) * multiple


def _is_plain(value: Any) -> bool:
    """Whether a value is one that an argument can have; the others are classes, types and functions by name."""
    if isinstance(value, list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
