"""The shape of a model whose checkpoint does not record it: what its tensors show, and what only the user knows.

A wrong rotary base or epsilon changes what a model computes, and no tensor shows it. So nothing of the kind has a
default here: what is neither shown nor given is asked for by name, all of it in one error.
"""

import math
from collections.abc import Mapping
from typing import Any

from megagrow.checkpoint.tensors.table import LAYERS
from megagrow.errors import CheckpointError

_ATTENTION, _MLP = LAYERS + "self_attention.", LAYERS + "mlp."
_QKV, _PROJ = _ATTENTION + "linear_qkv.weight", _ATTENTION + "linear_proj.weight"
_EXPERTS = _MLP + "experts.experts."
_EMBEDDING, _POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
_OUTPUT = "output_layer.weight"
_PADDING = 128
_WHAT_WOULD_DO = {
    "num_layers": "layers",
    "hidden_size": "width of the residual stream",
    "ffn_hidden_size": "width of the MLP",
    "vocab_size": "rows of the embedding",
    "num_attention_heads": "query heads",
    "num_query_groups": "KV heads",
    "kv_channels": "head_dim",
    "seq_length": "tokens per training sample",
    "layernorm_epsilon": "such as 1e-5 or 1e-6",
    "rotary_base": "theta, such as 10000 or 500000",
    "rotary_percent": "share of each head that is rotated, 1.0 for all of it",
    "rope_scaling_factor": "factor of Llama 3.1's scaling, such as 8.0, or null for none",
    "swiglu": "true if the gated MLP uses SiLU; no other gate is supported",
    "openai_gelu": "true for the tanh approximation of GELU, false for the exact one; nothing else is supported",
    "moe_router_topk": "experts per token",
    "untie_embeddings_and_output_weights": "false if the output layer shares the embedding's weights, else true",
}
"""Fields that may have to be asked for, and what would do."""
Shapes = Mapping[str, tuple[int, ...]]
"""Global shapes of a model's weights by canonical key; () for an output layer that may be a copy of the embedding."""


class ShapeNotRecordedError(CheckpointError):
    """A checkpoint can only be opened once its model's shape is known, and it does not record one.

    Attributes:
        shapes: of its weights.
    """

    def __init__(self, where: object, shapes: Shapes) -> None:
        self.shapes = shapes
        super().__init__(_question(where, _missing(shown_fields(shapes))))


def fields_of_unrecorded(where: object, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a shape that tensors show, completed by those that the user gave.

    Args:
        where: the checkpoint, for errors.
        shapes: of its weights.
        given: fields of `ModelShape` that the user gave; they take precedence.

    Raises:
        CheckpointError: a field is neither shown nor given. All such fields are named, each with what would do.
    """
    fields = _with_heads(where, shapes, {**shown_fields(shapes), **given})
    if missing := _missing(fields):
        raise CheckpointError(_question(where, missing))
    rows, tokens = fields["vocab_size"], given.get("vocab_size")
    if _EMBEDDING in shapes:
        rows = shapes[_EMBEDDING][0]
    fields.setdefault("make_vocab_size_divisible_by", _multiple(rows, tokens))
    return fields


def shown_fields(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a shape that the names and shapes of weights show without a doubt."""
    fields: dict[str, Any] = {
        "normalization": "LayerNorm" if _ATTENTION + "linear_qkv.layer_norm_bias" in shapes else "RMSNorm",
        "position_embedding_type": "learned_absolute" if _POSITIONS in shapes else "rope",
        "qk_layernorm": _ATTENTION + "q_layernorm.weight" in shapes,
        "add_bias_linear": _ATTENTION + "linear_proj.bias" in shapes,
    }
    fields["add_qkv_bias"] = _ATTENTION + "linear_qkv.bias" in shapes and not fields["add_bias_linear"]
    if shapes.get(_OUTPUT) != ():
        fields["untie_embeddings_and_output_weights"] = _OUTPUT in shapes
    if _EMBEDDING in shapes:
        fields["vocab_size"], fields["hidden_size"] = shapes[_EMBEDDING]
    if _POSITIONS in shapes:
        fields["max_position_embeddings"] = fields["seq_length"] = shapes[_POSITIONS][0]
    if _QKV in shapes:
        fields["num_layers"] = shapes[_QKV][0]
    if fields["qk_layernorm"] and _PROJ in shapes:
        fields["kv_channels"] = shapes[_ATTENTION + "q_layernorm.weight"][-1]
    return fields | _mlp_fields(shapes)


def _mlp_fields(shapes: Shapes) -> dict[str, Any]:
    """The fields of the MLP or of the experts. A gate is seen, but not its activation."""
    fields: dict[str, Any] = {}
    prefix = _EXPERTS if _EXPERTS + "linear_fc2.weight" in shapes else _MLP
    first, second = prefix + "linear_fc1.weight", prefix + "linear_fc2.weight"
    if first in shapes and second in shapes:
        fields["ffn_hidden_size"] = width = shapes[second][-1]
        if shapes[first][-2] == width:
            fields["swiglu"] = False
    if prefix == _EXPERTS:
        fields["num_moe_experts"] = shapes[second][1]
        fields["moe_ffn_hidden_size"] = fields["ffn_hidden_size"]
        if (shared := _MLP + "shared_experts.linear_fc2.weight") in shapes:
            fields["moe_shared_expert_intermediate_size"] = shapes[shared][-1]
    return fields


def _with_heads(where: object, shapes: Shapes, fields: dict[str, Any]) -> dict[str, Any]:
    """Complete heads, groups and head_dim: with the rows of linear_qkv, one of heads and head_dim gives the others.

    Raises:
        CheckpointError: the number that was given does not divide the rows.
    """
    if _QKV not in shapes or _PROJ not in shapes:
        return fields
    rows, columns = shapes[_QKV][-2], shapes[_PROJ][-1]
    for known, other in (("num_attention_heads", "kv_channels"), ("kv_channels", "num_attention_heads")):
        number = fields.get(known)
        if not isinstance(number, int) or number < 1:
            continue
        if columns % number:
            raise CheckpointError(
                f"{where}: source.{known}={number} does not divide the {columns} columns of linear_proj; "
                "heads times head_dim must be that number"
            )
        fields.setdefault(other, columns // number)
    heads, channels = fields.get("num_attention_heads"), fields.get("kv_channels")
    if isinstance(heads, int) and isinstance(channels, int) and rows > columns and (rows - columns) % (2 * channels):
        raise CheckpointError(
            f"{where}: source.num_attention_heads={heads} is not possible: the {rows} rows of linear_qkv are not "
            f"{heads} query heads and pairs of KV heads of {channels} channels"
        )
    if isinstance(channels, int):
        fields.setdefault("num_query_groups", (rows - columns) // (2 * channels))
    return fields


def _missing(fields: Mapping[str, Any]) -> list[str]:
    """The fields that decide the function, or that a shape needs, and that nobody has given."""
    wanted = ["num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "num_attention_heads"]
    wanted += ["num_query_groups", "kv_channels", "seq_length", "layernorm_epsilon", "swiglu"]
    wanted.append("untie_embeddings_and_output_weights")
    if fields.get("swiglu") is False:
        wanted.append("openai_gelu")
    if fields.get("position_embedding_type") == "rope":
        wanted += ["rotary_base", "rotary_percent", "rope_scaling_factor"]
    if fields.get("num_moe_experts") is not None:
        wanted.append("moe_router_topk")
    missing = [name for name in wanted if name not in fields]
    if "num_attention_heads" in missing and "num_layers" in fields:  # they follow from the heads and linear_qkv's rows
        missing = [name for name in missing if name not in ("num_query_groups", "kv_channels")]
    return missing


def _question(where: object, missing: list[str]) -> str:
    asked = ", ".join(f"source.{name}=... ({_WHAT_WOULD_DO[name]})" for name in missing)
    return (
        f"{where}: records no arguments, and has no run_config.yaml, so what its tensors do not show is unknown; give "
        f"{asked}, with: megagrow convert {where} TARGET source.NAME=VALUE..."
    )


def _multiple(rows: int, tokens: int | None) -> int:
    """The multiple that pads a vocabulary to exactly the rows of the embedding."""
    if tokens is None or tokens == rows:
        return math.gcd(rows, _PADDING)
    return _PADDING if -(-tokens // _PADDING) * _PADDING == rows else rows
