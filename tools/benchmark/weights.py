"""One set of weights for every model, by Megatron's global keys: whole tensors that each model cuts for itself.

The values depend on the key alone, so any layout of any implementation gets the same model. The table of keys is
written down here and not asked of Megatron-Core, so that a test can hold one against the other.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_LAYER = "decoder.layers."


def global_shapes(shape: Any) -> dict[str, tuple[int, ...]]:
    """Global key -> global shape of every weight of a `ModelShape`; layers are stacked on dimension 0."""
    hidden, ffn, d, groups = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim, shape.groups
    qkv, fc1 = groups * (shape.heads_per_group + 2) * d, ffn * (2 if shape.swiglu else 1)
    inside: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "self_attention.linear_proj.weight": (hidden, shape.num_attention_heads * d),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (fc1, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    outside: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (shape.padded_vocab_size, hidden),
        "decoder.final_layernorm.weight": (hidden,),
    }
    if shape.normalization == "LayerNorm":
        inside["self_attention.linear_qkv.layer_norm_bias"] = inside["mlp.linear_fc1.layer_norm_bias"] = (hidden,)
        outside["decoder.final_layernorm.bias"] = (hidden,)
    if shape.add_bias_linear:
        inside |= {"self_attention.linear_qkv.bias": (qkv,), "self_attention.linear_proj.bias": (hidden,)}
        inside |= {"mlp.linear_fc1.bias": (fc1,), "mlp.linear_fc2.bias": (hidden,)}
    if shape.qk_layernorm:
        inside |= {"self_attention.q_layernorm.weight": (d,), "self_attention.k_layernorm.weight": (d,)}
        if shape.normalization == "LayerNorm":
            inside |= {"self_attention.q_layernorm.bias": (d,), "self_attention.k_layernorm.bias": (d,)}
    if shape.position_embedding_type == "learned_absolute":
        outside["embedding.position_embeddings.weight"] = (shape.positions, hidden)
    if not shape.tied:
        outside["output_layer.weight"] = (shape.padded_vocab_size, hidden)
    return outside | {_LAYER + key: (shape.num_layers, *size) for key, size in inside.items()}


def random_state(shape: Any) -> dict[str, torch.Tensor]:
    """Whole fp32 weights by global key: normal around 0, or around 1 for the gains of norms."""
    state = {}
    for key, size in global_shapes(shape).items():
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * shape.init_method_std
        gain = key.endswith(("norm.weight", "norm_weight"))
        state[key] = values + 1 if gain else values
    return state


def local_pieces(chunk: Any) -> Iterator[Any]:
    """The ShardedTensors of a Megatron-Core model chunk; `data` of each is the live parameter or a view of it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in chunk.sharded_state_dict().values():
        pieces = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        yield from (piece for piece in pieces if isinstance(piece, ShardedTensor))


@torch.no_grad()
def load_megatron(chunks: Iterable[Any], state: dict[str, torch.Tensor]) -> None:
    """Copy this rank's slice of every tensor into its model chunks."""
    for chunk in chunks:
        for piece in local_pieces(chunk):
            stacked, whole = piece.prepend_axis_num, state[piece.key]
            assert tuple(whole.shape) == tuple(piece.global_shape), piece.key
            for position in piece.global_offset[:stacked]:
                whole = whole[position]
            for dim, start in enumerate(piece.global_offset[stacked:]):
                whole = whole.narrow(dim, start, piece.data.shape[dim])
            piece.data.copy_(whole)


@torch.no_grad()
def load_plain(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Copy Megatron's weights into a `PlainGPT`: rows of linear_qkv come per group as its queries, key, value."""
    model.embedding.weight.copy_(state["embedding.word_embeddings.weight"])
    model.norm.load_state_dict(_named(state, "decoder.final_layernorm."))
    if not model.shape.tied:
        model.output.weight.copy_(state["output_layer.weight"])
    if model.shape.position_embedding_type == "learned_absolute":
        model.positions.weight.copy_(state["embedding.position_embeddings.weight"])
    for index, layer in enumerate(model.layers):
        own = {key.removeprefix(_LAYER): value[index] for key, value in state.items() if key.startswith(_LAYER)}
        attention = _named(own, "self_attention.linear_qkv.")
        layer.norm_1.load_state_dict(_named(attention, "layer_norm_"))
        layer.norm_2.load_state_dict(_named(own, "mlp.linear_fc1.layer_norm_"))
        layer.qkv.load_state_dict(
            {name: _by_kind(rows, model.shape) for name, rows in attention.items() if not name.startswith("layer_norm")}
        )
        for module, prefix in (
            (layer.proj, "self_attention.linear_proj."),
            (layer.fc1, "mlp.linear_fc1."),
            (layer.fc2, "mlp.linear_fc2."),
        ):
            named = _named(own, prefix)
            module.load_state_dict({name: value for name, value in named.items() if not name.startswith("layer_norm")})
        if model.shape.qk_layernorm:
            layer.norm_q.load_state_dict(_named(own, "self_attention.q_layernorm."))
            layer.norm_k.load_state_dict(_named(own, "self_attention.k_layernorm."))


def _named(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _by_kind(rows: torch.Tensor, shape: Any) -> torch.Tensor:
    """[g * (r + 2) * d, ...] by group -> all queries, all keys, all values."""
    by_group = rows.unflatten(0, (shape.groups, shape.heads_per_group + 2, shape.head_dim))
    q, k, v = by_group.split([shape.heads_per_group, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in (q, k, v)])
