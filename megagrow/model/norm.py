"""RMSNorm and LayerNorm that Megatron-Core can use under sequence parallelism.

Under sequence parallelism each tensor rank norms its own part of the sequence, so gradients of the norm's
parameters have to be summed over the tensor ranks. Megatron-Core does that for parameters that carry the attribute
`sequence_parallel`; its own stand-in for the fused norms refuses instead. Parameter names are torch's, and with
them the checkpoint's keys.

torch has a fused RMSNorm on CUDA but not on CPU, where it is a chain of passes over memory; there, in fp32, ours
makes half as many.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    """The norm that `config.normalization` names, over the last dimension, [..., hidden_size] -> the same."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
            self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed x, in x's type."""
        if self.bias is None:
            if x.device.type == "cpu" and x.dtype == torch.float32:
                return _RmsNorm.apply(x, self.weight, self.eps)
            return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
        return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)


class _RmsNorm(torch.autograd.Function):
    """y = x * r * w with r = 1 / sqrt(mean(x^2) + eps) of each row (Zhang and Sennrich, arXiv 1910.07467).

    With u = g * w, the gradient of x is r * u - x * r^3 * mean(u * x), and that of w the sum of g * x * r.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, r = ctx.saved_tensors
        rows = x.numel() // x.shape[-1]
        product = (grad * x).view(rows, -1)  # both sums below are matrix-vector products of it
        grad_weight = product.t().mv(r.reshape(rows))
        mean = product.mv(weight).view_as(r).div_(x.shape[-1])
        grad_x = (grad * weight).mul_(r).addcmul_(x, mean.mul_(r).mul_(r).mul_(r), value=-1)
        return grad_x, grad_weight, None
