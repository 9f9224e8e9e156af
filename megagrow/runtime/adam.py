"""Adam with FusedAdam's interface, for a node with neither Transformer Engine nor apex, on CPU or CUDA.

Megatron-Core's distributed optimizer expects FusedAdam: the step is an int of the parameter group and the state of
a parameter is `exp_avg` and `exp_avg_sq`. With torch's AdamW instead, a checkpoint cannot be resumed (no state
before the first step; then one step tensor shared by all parameters and incremented by each). The arithmetic here
is torch's own fused kernel: one pass over memory, bit-equal for any number of threads. Only the last few entries of
a tensor take a path that is not vectorized, so other shard boundaries may round them differently.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Adam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`: L2) or AdamW (the default) over fp32 parameters; `lr` may change before any step.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        if not bias_correction:
            raise ValueError("bias_correction=False: torch's fused kernels always correct; leave it True")
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloaded
        """Update every parameter that has a gradient; return the result of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            # An int in the group, not a tensor per parameter: FusedAdam's state, and so the checkpoint's.
            group["step"] = group.get("step", 0) + 1
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            states = [self._state_of(parameter) for parameter in params]
            count = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
            kernel(
                params,
                [parameter.grad for parameter in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [count] * len(params),  # the kernel only reads it
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return loss

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def install() -> tuple[str, ...]:
    """Install `Adam` as Megatron-Core's FusedAdam where it found none; return the dotted names replaced, or ().

    Also applies with CUDA: a GPU node without Transformer Engine and apex has the same defect.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return ()
    changes: tuple[tuple[Any, str, Any], ...] = (
        (optimizer, "Adam", Adam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", Adam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
    )
    for owner, name, value in changes:
        setattr(owner, name, value)
    return tuple(f"{owner.__name__}.{name}" for owner, name, _ in changes)
