"""Activations that Megatron-Core lacks: GPT-2's GELU, and SwiGLU in one autograd node.

Our SwiGLU saves only its input for backward, and writes the gradient in place. Megatron-Core's fused one is compiled
by torch, which costs a minute on CPU before the first step; its unfused one also saves the inner activations and
joins the gradients of the two halves with a copy. Function and rounding of the result are the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415, section 2), as in GPT-2."""
    return F.gelu(x, approximate="tanh")


class SwiGlu:
    """silu(gate) * up (Shazeer, arXiv 2002.05202) on [..., 2 F], the gate first -> [..., F].

    Not an nn.Module: Megatron-Core's MLP requests a checkpoint entry from every child module, and this has none.
    """

    def __init__(self, config: TransformerConfig) -> None:
        assert config.gated_linear_unit and config.activation_func is F.silu

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gated activation, in x's type."""
        return _swiglu(x)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x


_swiglu: Callable[[torch.Tensor], torch.Tensor] = _SwiGlu.apply
