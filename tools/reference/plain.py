"""An independent reference: a Llama or GPT forward in plain PyTorch, from a dict of canonical tensors.

No Megatron and none of megagrow but the shape: what a checkpoint's tensors mean, said a second time. Legend of
shapes: B batch, S sequence, H hidden, G groups, R query heads a group, D head_dim, F ffn, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.config import ModelShape

Weights = dict[str, Tensor]


def logits_BSV(weights: Weights, shape: ModelShape, tokens_BS: Tensor) -> Tensor:
    """Logits of every position, in the dtype of the weights."""
    hidden_BSH = weights["embedding.word_embeddings.weight"][tokens_BS]
    if shape.position_embedding_type == "learned_absolute":
        hidden_BSH = hidden_BSH + weights["embedding.position_embeddings.weight"][: tokens_BS.shape[1]]
    for layer in range(shape.num_layers):
        one = {key: value[layer] for key, value in weights.items() if key.startswith("decoder.layers.")}
        hidden_BSH = hidden_BSH + _attention(one, shape, hidden_BSH)
        hidden_BSH = hidden_BSH + _mlp(one, shape, hidden_BSH)
    final_BSH = _norm(weights, "decoder.final_layernorm.", "", shape, hidden_BSH)
    output_VH = weights["embedding.word_embeddings.weight" if shape.tied else "output_layer.weight"]
    return final_BSH @ output_VH.T


def loss(weights: Weights, shape: ModelShape, tokens_BS: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    logits = logits_BSV(weights, shape, tokens_BS[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())


def _norm(weights: Weights, prefix: str, infix: str, shape: ModelShape, x: Tensor) -> Tensor:
    weight, size = weights[f"{prefix}{infix}weight"], (x.shape[-1],)
    if shape.normalization == "RMSNorm":
        return F.rms_norm(x, size, weight, shape.layernorm_epsilon)
    return F.layer_norm(x, size, weight, weights[f"{prefix}{infix}bias"], shape.layernorm_epsilon)


def _linear(one: Weights, key: str, x: Tensor) -> Tensor:
    return F.linear(x, one[key + ".weight"], one.get(key + ".bias"))


def _attention(one: Weights, shape: ModelShape, hidden_BSH: Tensor) -> Tensor:
    attention = "decoder.layers.self_attention."
    x = _norm(one, attention, "linear_qkv.layer_norm_", shape, hidden_BSH)
    batch, length, _ = x.shape
    groups, per_group, width = shape.groups, shape.heads_per_group, shape.head_dim
    mixed = _linear(one, attention + "linear_qkv", x).view(batch, length, groups, per_group + 2, width)
    query = mixed[:, :, :, :per_group]
    key, value = (mixed[:, :, :, slot : slot + 1] for slot in (per_group, per_group + 1))
    if shape.qk_layernorm:
        query = _norm(one, attention, "q_layernorm.", shape, query)
        key = _norm(one, attention, "k_layernorm.", shape, key)
    if shape.position_embedding_type == "rope":
        query, key = (_rotate(t, shape.rotary_base) for t in (query, key))
    scores = torch.einsum("bsgrd,btgxd->bgrst", query, key) / width**0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights_BGRST = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    out = torch.einsum("bgrst,btgxd->bsgrd", weights_BGRST, value).reshape(batch, length, -1)
    return _linear(one, attention + "linear_proj", out)


def _rotate(x_BSGXD: Tensor, base: int) -> Tensor:
    """Rotary embedding, the two halves of head_dim rotated against each other; tables in float32, as everywhere."""
    length, width = x_BSGXD.shape[1], x_BSGXD.shape[-1]
    frequency = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], -1)[None, :, None, None, :]
    first, second = x_BSGXD.chunk(2, -1)
    cos, sin = angle.cos().to(x_BSGXD.dtype), angle.sin().to(x_BSGXD.dtype)
    return x_BSGXD * cos + torch.cat([-second, first], -1) * sin


def _mlp(one: Weights, shape: ModelShape, hidden_BSH: Tensor) -> Tensor:
    prefix = "decoder.layers.mlp."
    if shape.num_moe_experts is None:
        x = _norm(one, prefix, "linear_fc1.layer_norm_", shape, hidden_BSH)
        return _linear(one, prefix + "linear_fc2", _activation(shape, _linear(one, prefix + "linear_fc1", x)))
    x = _norm(one, "decoder.layers.pre_mlp_layernorm.", "", shape, hidden_BSH)
    out = _mixture(one, prefix, shape, x)
    if shape.moe_shared_expert_intermediate_size is not None:
        shared = _activation(shape, _linear(one, prefix + "shared_experts.linear_fc1", x))
        out = out + _linear(one, prefix + "shared_experts.linear_fc2", shared)
    return out


def _mixture(one: Weights, prefix: str, shape: ModelShape, x: Tensor) -> Tensor:
    """Every token's chosen experts, by the softmax of their router logits alone; E experts, computed one by one."""
    logits_BSE = x @ one[prefix + "router.weight"].T
    chosen, index = logits_BSE.topk(shape.moe_router_topk, dim=-1)
    weight_BSE = torch.zeros_like(logits_BSE).scatter(-1, index, chosen.softmax(-1))
    out = torch.zeros_like(x)
    for expert in range(logits_BSE.shape[-1]):
        fc1, fc2 = (one[f"{prefix}experts.experts.linear_{name}.weight"][expert] for name in ("fc1", "fc2"))
        out = out + weight_BSE[..., expert : expert + 1] * (_activation(shape, x @ fc1.T) @ fc2.T)
    return out


def _activation(shape: ModelShape, x: Tensor) -> Tensor:
    if not shape.swiglu:
        return F.gelu(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
