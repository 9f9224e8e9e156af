"""Causal core attention on torch's scaled_dot_product_attention, including rotary positions.

Megatron-Core projects to queries, keys and values and back; the core attention between the projections has no
parameters and no checkpoint keys. This one never builds the [s, s] matrix of scores. It applies rotary positions
itself, because Megatron-Core's unfused code passes over queries and keys six times and this twice.

Shapes: s sequence, b batch, n query heads of this rank, g KV heads of this rank, d head_dim.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional as F

from megagrow.errors import ConfigError

_LLAMA3_POSITIONS, _LLAMA3_SLOW, _LLAMA3_FAST = 8192, 1.0, 4.0


class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864), halves paired as in Megatron-Core and Llama.

    The first `channels` of a head are rotated, the rest are unchanged. All layers of a model share one object, so
    each table is computed once. Tables are computed in fp32.
    """

    def __init__(self, channels: int, base: int, scaling_factor: float | None = None) -> None:
        self.channels, self.base, self.scaling_factor = channels, base, scaling_factor
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x_SBND: torch.Tensor) -> torch.Tensor:
        """Return x with position p of dimension 0 rotated by p times each frequency."""
        cos, sin = self._table(x_SBND.shape[0], x_SBND.device, x_SBND.dtype)
        return _rotary(x_SBND, cos, sin)

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        key = (length, device, dtype)
        if key not in self._tables:
            positions = torch.arange(length, dtype=torch.float32, device=device)
            angle_S11D = torch.outer(positions, self.frequencies(device))[:, None, None, :]
            self._tables[key] = (angle_S11D.cos().to(dtype), angle_S11D.sin().to(dtype))
        return self._tables[key]

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Return the radians per position of each pair of channels, [channels / 2], fp32."""
        exponent = torch.arange(0, self.channels, 2, dtype=torch.float32, device=device) / self.channels
        plain = 1.0 / self.base**exponent
        if self.scaling_factor is None:
            return plain
        # Llama 3.1: frequencies with at most one turn in 8192 positions are divided by the factor, those with four or
        # more are kept, with linear interpolation between. Megatron-Core has these three numbers built in.
        turns = _LLAMA3_POSITIONS * plain / (2 * math.pi)
        kept = ((turns - _LLAMA3_SLOW) / (_LLAMA3_FAST - _LLAMA3_SLOW)).clamp(0.0, 1.0)
        return plain * kept + plain / self.scaling_factor * (1.0 - kept)


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of the rotated channels; backward rotates back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


_rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = _Rotate.apply


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = 2 * cos.shape[-1]
    (a, b), (out_a, out_b) = x[..., :channels].chunk(2, dim=-1), out[..., :channels].chunk(2, dim=-1)
    out[..., channels:] = x[..., channels:]
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


class CausalAttention(nn.Module):
    """Core attention for Megatron-Core's `SelfAttention`: causal, grouped queries, no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ConfigError(
                f"context_parallel_size {config.context_parallel_size} needs transformer-engine and CUDA; "
                "set it to 1 or install megagrow[gpu]"
            )
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"attention mask type {attn_mask_type}: only causal attention is implemented here")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.rotary = rotary
        # Under sequence parallelism TransformerBlock has already forked the tracker; a second fork inside the first
        # would restart from the same state and draw the same random numbers.
        self.forks = not config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[s,b,n,d], [s,b,g,d], [s,b,g,d] -> [s,b,n*d]; ValueError for a mask, a bias or packed sequences."""
        for name, given in (
            ("attention_mask", attention_mask),
            ("attention_bias", attention_bias),
            ("packed_seq_params", packed_seq_params),
        ):
            if given is not None:
                raise ValueError(f"{name} must be None: this attention is causal over whole samples")
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        dropout = self.dropout if self.training else 0.0
        if dropout and self.forks:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return self._attend(query, key, value, dropout)
        return self._attend(query, key, value, dropout)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        q_BNSD, k_BGSD, v_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD,
            k_BGSD,
            v_BGSD,
            dropout_p=dropout,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out_BNSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
