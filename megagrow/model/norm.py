"""RMSNorm and LayerNorm that Megatron-Core can use under sequence parallelism.

Under sequence parallelism each tensor rank normalizes its own part of the sequence, so gradients of the norm's
parameters must be summed over the tensor ranks. Megatron-Core does that for parameters with the attribute
`sequence_parallel`; its own replacement for the fused norms raises an error instead. Parameter names, and so the
checkpoint's keys, are torch's.

torch has a fused RMSNorm on CUDA but not on CPU, where it takes several passes over memory; there, in fp32, ours
takes half as many.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    """The norm selected by `config.normalization` over the last dimension, [..., hidden_size] -> [..., hidden_size]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        _mark(self.weight, config.sequence_parallel)
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
            _mark(self.bias, config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized x, in x's type."""
        if self.bias is None:
            if x.device.type == "cpu" and x.dtype == torch.float32:
                return _rms_norm(x, self.weight, self.eps)
            return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
        return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)


class _SequenceParallel(Protocol):
    """A parameter with the attribute by which Megatron-Core sums its gradient over the tensor ranks."""

    sequence_parallel: bool


def _mark(parameter: nn.Parameter, sequence_parallel: bool) -> None:
    cast(_SequenceParallel, parameter).sequence_parallel = sequence_parallel


class _RmsNorm(torch.autograd.Function):
    """y = x * r * w with r = 1 / sqrt(mean(x^2) + eps) for each row (Zhang and Sennrich, arXiv 1910.07467).

    With u = g * w, the gradient of x is r * u - x * r^3 * mean(u * x), and that of w the sum of g * x * r.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        square: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        rows = x.numel() // x.shape[-1]
        product = (grad * x).view(rows, -1)  # both sums below are matrix-vector products of this
        grad_weight = product.t().mv(r.reshape(rows))
        mean = product.mv(weight).view_as(r).div_(x.shape[-1])
        grad_x = (grad * weight).mul_(r).addcmul_(x, mean.mul_(r).mul_(r).mul_(r), value=-1)
        return grad_x, grad_weight, None


_rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = _RmsNorm.apply
