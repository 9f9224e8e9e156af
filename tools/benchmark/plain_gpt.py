"""The same models in plain PyTorch: nothing parallel, nothing clever, [batch, sequence, hidden] throughout.

It is what the benchmark measures Megatron-Core against, and what tests take for the truth: it shares no code with
megagrow's model room, and reads Megatron's weights by their global keys, so an error in either shows.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class PlainGPT(nn.Module):
    """A GPT of a `ModelShape`: Llama-like or GPT-like, tied or not."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape
        vocabulary, hidden = shape.padded_vocab_size, shape.hidden_size
        self.embedding = nn.Embedding(vocabulary, hidden)
        if shape.position_embedding_type == "learned_absolute":
            self.positions = nn.Embedding(shape.positions, hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = make_norm(shape, hidden)
        self.output = nn.Linear(hidden, vocabulary, bias=False)
        if shape.tied:
            self.output.weight = self.embedding.weight
        frequency = 1.0 / shape.rotary_base ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.outer(torch.arange(shape.seq_length).float(), frequency).repeat(1, 2)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [b,s] -> logits [b,s,vocabulary]."""
        x = self.embedding(tokens)
        if self.shape.position_embedding_type == "learned_absolute":
            x = x + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return self.output(self.norm(x))

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats of tokens [b,s] against labels [b,s]."""
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), labels.flatten())


class Layer(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape
        hidden, ffn, bias = shape.hidden_size, shape.ffn_hidden_size, shape.add_bias_linear
        heads, groups, d = shape.num_attention_heads, shape.groups, shape.head_dim
        self.sizes = [heads * d, groups * d, groups * d]
        self.norm_1, self.norm_2 = make_norm(shape, hidden), make_norm(shape, hidden)
        self.qkv = nn.Linear(hidden, sum(self.sizes), bias=bias)
        self.proj = nn.Linear(heads * d, hidden, bias=bias)
        self.fc1 = nn.Linear(hidden, ffn * (2 if shape.swiglu else 1), bias=bias)
        self.fc2 = nn.Linear(ffn, hidden, bias=bias)
        if shape.qk_layernorm:
            self.norm_q, self.norm_k = make_norm(shape, d), make_norm(shape, d)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[b,s,h] -> [b,s,h]."""
        parts = self.qkv(self.norm_1(x)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in parts)
        if self.shape.qk_layernorm:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.shape.position_embedding_type == "rope":
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        inner = self.fc1(self.norm_2(x))
        if self.shape.swiglu:
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner)
        return x + self.fc2(inner)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on [b,heads,s,d]: the first half of d is paired with the second."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def make_norm(shape: Any, size: int) -> nn.Module:
    """RMSNorm or LayerNorm."""
    kind = nn.RMSNorm if shape.normalization == "RMSNorm" else nn.LayerNorm
    return kind(size, eps=shape.layernorm_epsilon)
