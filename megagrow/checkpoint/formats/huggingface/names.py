"""The names of Hugging Face tensors by Megatron's canonical keys: one table for each family of names.

A table may have more rows than a model has tensors: rows are looked up by the keys of the model's tensors.
"""

from collections.abc import Mapping

from megagrow.checkpoint.formats.huggingface.placement import TableRow, by_group, by_group_in_one, halves
from megagrow.checkpoint.tensors import LAYERS

_ATTENTION, _MLP = LAYERS + "self_attention.", LAYERS + "mlp."
_EXPERTS = _MLP + "experts.experts."


def _rows(table: Mapping[str, str], *arranged: tuple[str, TableRow]) -> dict[str, TableRow]:
    return {key: TableRow((name,)) for key, name in table.items()} | dict(arranged)


def llama_attention() -> dict[str, TableRow]:
    """Embeddings, attention, last norm and output layer of Llama, Mistral, Qwen and Mixtral."""
    layer = "model.layers.{layer}."
    return _rows(
        {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            _ATTENTION + "linear_qkv.layer_norm_weight": layer + "input_layernorm.weight",
            _ATTENTION + "q_layernorm.weight": layer + "self_attn.q_norm.weight",
            _ATTENTION + "k_layernorm.weight": layer + "self_attn.k_norm.weight",
            _ATTENTION + "linear_proj.weight": layer + "self_attn.o_proj.weight",
            _ATTENTION + "linear_proj.bias": layer + "self_attn.o_proj.bias",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "output_layer.weight": "lm_head.weight",
        },
        *(
            (
                f"{_ATTENTION}linear_qkv.{what}",
                TableRow(tuple(f"{layer}self_attn.{x}_proj.{what}" for x in "qkv"), by_group),
            )
            for what in ("weight", "bias")
        ),
    )


def llama_mlp() -> dict[str, TableRow]:
    """The gated MLP of Llama, Mistral and Qwen, with its norm."""
    layer = "model.layers.{layer}."
    return _rows(
        {
            _MLP + "linear_fc1.layer_norm_weight": layer + "post_attention_layernorm.weight",
            _MLP + "linear_fc2.weight": layer + "mlp.down_proj.weight",
            _MLP + "linear_fc2.bias": layer + "mlp.down_proj.bias",
        },
        *(
            (
                f"{_MLP}linear_fc1.{what}",
                TableRow((f"{layer}mlp.gate_proj.{what}", f"{layer}mlp.up_proj.{what}"), halves),
            )
            for what in ("weight", "bias")
        ),
    )


def mixtral_experts() -> dict[str, TableRow]:
    """The experts of Mixtral, with tensors for each expert."""
    layer = "model.layers.{layer}."
    block, expert = layer + "block_sparse_moe.", layer + "block_sparse_moe.experts.{expert}."
    return _rows(
        {
            LAYERS + "pre_mlp_layernorm.weight": layer + "post_attention_layernorm.weight",
            _MLP + "router.weight": block + "gate.weight",
            _EXPERTS + "linear_fc2.weight": expert + "w2.weight",
        },
        (_EXPERTS + "linear_fc1.weight", TableRow((expert + "w1.weight", expert + "w3.weight"), halves)),
    )


def mixtral_stacked() -> dict[str, TableRow]:
    """The experts of Mixtral in one tensor, as transformers 5 has them in memory; on disk it writes one per expert."""
    layer = "model.layers.{layer}."
    return _rows(
        {
            LAYERS + "pre_mlp_layernorm.weight": layer + "post_attention_layernorm.weight",
            _MLP + "router.weight": layer + "mlp.gate.weight",
            _EXPERTS + "linear_fc1.weight": layer + "mlp.experts.gate_up_proj",
            _EXPERTS + "linear_fc2.weight": layer + "mlp.experts.down_proj",
        }
    )


def gpt2(prefix: str) -> dict[str, TableRow]:
    """All tensors of GPT-2; the first published checkpoints have no prefix."""
    layer = prefix + "h.{layer}."
    return _rows(
        {
            "embedding.word_embeddings.weight": prefix + "wte.weight",
            "embedding.position_embeddings.weight": prefix + "wpe.weight",
            _ATTENTION + "linear_qkv.layer_norm_weight": layer + "ln_1.weight",
            _ATTENTION + "linear_qkv.layer_norm_bias": layer + "ln_1.bias",
            _ATTENTION + "linear_proj.bias": layer + "attn.c_proj.bias",
            _MLP + "linear_fc1.layer_norm_weight": layer + "ln_2.weight",
            _MLP + "linear_fc1.layer_norm_bias": layer + "ln_2.bias",
            _MLP + "linear_fc1.bias": layer + "mlp.c_fc.bias",
            _MLP + "linear_fc2.bias": layer + "mlp.c_proj.bias",
            "decoder.final_layernorm.weight": prefix + "ln_f.weight",
            "decoder.final_layernorm.bias": prefix + "ln_f.bias",
            "output_layer.weight": "lm_head.weight",
        },
        # GPT-2's linear layers are of class Conv1D, whose weights have the input dimension first.
        (_ATTENTION + "linear_qkv.weight", TableRow((layer + "attn.c_attn.weight",), by_group_in_one, transposed=True)),
        (_ATTENTION + "linear_qkv.bias", TableRow((layer + "attn.c_attn.bias",), by_group_in_one)),
        (_ATTENTION + "linear_proj.weight", TableRow((layer + "attn.c_proj.weight",), transposed=True)),
        (_MLP + "linear_fc1.weight", TableRow((layer + "mlp.c_fc.weight",), transposed=True)),
        (_MLP + "linear_fc2.weight", TableRow((layer + "mlp.c_proj.weight",), transposed=True)),
    )


def gpt_neox() -> dict[str, TableRow]:
    """All tensors of GPT-NeoX.

    Its fused queries, keys and values are ordered head by head, which is Megatron's order if every head has its own
    keys and values.
    """
    layer = "gpt_neox.layers.{layer}."
    table = {
        "embedding.word_embeddings.weight": "gpt_neox.embed_in.weight",
        _ATTENTION + "linear_qkv.layer_norm_weight": layer + "input_layernorm.weight",
        _ATTENTION + "linear_qkv.layer_norm_bias": layer + "input_layernorm.bias",
        _MLP + "linear_fc1.layer_norm_weight": layer + "post_attention_layernorm.weight",
        _MLP + "linear_fc1.layer_norm_bias": layer + "post_attention_layernorm.bias",
        "decoder.final_layernorm.weight": "gpt_neox.final_layer_norm.weight",
        "decoder.final_layernorm.bias": "gpt_neox.final_layer_norm.bias",
        "output_layer.weight": "embed_out.weight",
    }
    for what in ("weight", "bias"):
        table[f"{_ATTENTION}linear_qkv.{what}"] = f"{layer}attention.query_key_value.{what}"
        table[f"{_ATTENTION}linear_proj.{what}"] = f"{layer}attention.dense.{what}"
        table[f"{_MLP}linear_fc1.{what}"] = f"{layer}mlp.dense_h_to_4h.{what}"
        table[f"{_MLP}linear_fc2.{what}"] = f"{layer}mlp.dense_4h_to_h.{what}"
    return _rows(table)
