"""Translate the names of tensors in Megatron's modules, old dialect or new, to canonical keys and back.

A rank of Megatron-Core calls a tensor `decoder.layers.0.self_attention.linear_qkv.weight`; Megatron-LM's older models
called it `language_model.encoder.layers.0.self_attention.query_key_value.weight`. Both are row `linear_qkv.weight` of
the table of tensors (`tensors/table.py`), in the first layer of this rank. A dialect is a list of renamings; a name
that no renaming makes canonical is passed on unchanged, and the reader refuses it by name.
"""

import re
from dataclasses import dataclass

from megagrow.checkpoint.tensors import LAYERS

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")
_LAYER = re.compile(r"^(?:decoder|language_model\.(?:encoder|transformer))\.layers\.(?:(\d+)\.)?(.+)$")
_OLD_LAYER = (
    (re.compile(r"^(?:self_)?attention\.query_key_value\."), "self_attention.linear_qkv."),
    (re.compile(r"^(?:self_)?attention\.dense\."), "self_attention.linear_proj."),
    (re.compile(r"^input_norm\."), "input_layernorm."),
    (re.compile(r"^post_attention_(?:layer)?norm\."), "pre_mlp_layernorm."),
    (re.compile(r"^mlp\.dense_h_to_4h\."), "mlp.linear_fc1."),
    (re.compile(r"^mlp\.dense_4h_to_h\."), "mlp.linear_fc2."),
)
_OLD = (
    (re.compile(r"^language_model\.embedding\."), "embedding."),
    (re.compile(r"^language_model\.(?:encoder|transformer)\.final_(?:layer)?norm\."), "decoder.final_layernorm."),
    (re.compile(r"^language_model\.output_layer\."), "output_layer."),
    (re.compile(r"^word_embeddings_for_head\."), "output_layer."),
)
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_GROUPED_EXPERT = re.compile(r"^mlp\.experts\.(linear_fc[12]\.weight)(\d+)$")
_NOT_WEIGHTS = re.compile(r"(?:_extra_state|\.inv_freq)$")
_NORMS = (("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),)
_DENSE_NORMS = (*_NORMS, ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"))
EXPERTS = LAYERS + "mlp.experts.experts."
"""Prefix of the canonical keys of experts' tensors."""


@dataclass(frozen=True)
class ModuleName:
    """A canonical key, with the layer and the expert, in the rank's numbering, if the tensor belongs to one."""

    key: str
    layer: int | None = None
    expert: int | None = None


def canonical_name(raw: str, *, dense: bool) -> ModuleName | None:
    """Return the canonical name of a module's tensor; None for one that is not a weight: a buffer or extra state.

    Args:
        raw: its name in the module's state dict; layers may be stacked, as in `decoder.layers.mlp...`.
        dense: whether the model has no experts. Then the second norm belongs to linear_fc1, as in fused layers.
    """
    if _NOT_WEIGHTS.search(raw):
        return None
    bare = _WRAPPERS.sub("", raw)
    match = _LAYER.match(bare)
    if match is None:
        return ModuleName(_rename(bare, _OLD))
    rest = _rename(match[2], _OLD_LAYER)
    expert = None
    if found := _EXPERT.match(rest):
        expert, rest = int(found[1]), f"mlp.experts.experts.{found[2]}"
    elif found := _GROUPED_EXPERT.match(rest):
        expert, rest = int(found[2]), f"mlp.experts.experts.{found[1]}"
    for local, fused in _DENSE_NORMS if dense else _NORMS:
        if rest.startswith(local):
            rest = fused + rest.removeprefix(local)
    return ModuleName(LAYERS + rest, None if match[1] is None else int(match[1]), expert)


def is_older_dialect(raw: str) -> bool:
    """Whether a name is in Megatron-LM's older dialect."""
    return _WRAPPERS.sub("", raw).startswith("language_model.")


def module_name(key: str, *, fused_norms: bool, dense: bool, layer: int | None, expert: int | None) -> str:
    """Return the name of a canonical tensor in Megatron-Core's `GPTModel`: the inverse of `canonical_name`.

    Args:
        key: the canonical key.
        fused_norms: whether a norm is part of the linear layer that follows it, as in Transformer Engine.
        dense: whether the model has no experts.
        layer, expert: in the rank's numbering.
    """
    if layer is None:
        return key
    rest = key.removeprefix(LAYERS)
    if expert is not None:
        rest = rest.replace("mlp.experts.experts.", f"mlp.experts.local_experts.{expert}.")
    for local, fused in () if fused_norms else _DENSE_NORMS if dense else _NORMS:
        if rest.startswith(fused):
            rest = local + rest.removeprefix(fused)
    return f"{LAYERS}{layer}.{rest}"


def _rename(name: str, renamings: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, new in renamings:
        name = pattern.sub(new, name)
    return name
