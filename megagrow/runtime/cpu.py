"""Runs Megatron-Core without CUDA by replacing a table of attributes, each for a stated reason, and nothing else.

Megatron-Core uses the current CUDA device in a few dozen places. Each of them goes through one of the attributes in
the tables below, so replacing these attributes is enough, and tests on a laptop run the same code as a cluster. The
alternative, a `TorchFunctionMode`, costs 5 microseconds on every torch call and does not extend to other threads.
Where CUDA is available, `install` changes nothing.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

_PATCHED = "__megagrow_cpu__"


@dataclass(frozen=True)
class Patch:
    """One attribute to replace: `make` takes the original (None if there is none) and returns the replacement."""

    owner: str
    name: str
    make: Callable[[Any], Any]
    why: str

    @property
    def label(self) -> str:
        """Dotted name of the attribute."""
        return f"{self.owner}.{self.name}"


def install() -> tuple[str, ...]:
    """Apply the patches and return their dotted names; () with CUDA or when they were applied before."""
    if torch.cuda.is_available():
        return ()
    return tuple(patch.label for patch in patches() if _apply(patch))


def patches() -> tuple[Patch, ...]:
    """All patches. File names and line numbers in the reasons refer to megatron/core of megatron-core 0.16.1."""
    return (*_device_patches(), *_factory_patches(), *_megatron_patches(), *_expert_patches())


def owner_of(patch: Patch) -> Any:
    """Return the module or class that has a patch's attribute."""
    try:
        return importlib.import_module(patch.owner)
    except ModuleNotFoundError:
        module, _, name = patch.owner.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _apply(patch: Patch) -> bool:
    owner = owner_of(patch)
    done = vars(owner).get(_PATCHED, frozenset())
    if patch.name in done:
        return False
    setattr(owner, patch.name, patch.make(getattr(owner, patch.name, None)))
    setattr(owner, _PATCHED, done | {patch.name})
    return True


def _device_patches() -> tuple[Patch, ...]:
    cuda = "torch.cuda"
    return (
        Patch(cuda, "current_device", _with(lambda: torch.device("cpu")), "DDP buffers, rope, p2p, utils 631"),
        Patch(cuda, "synchronize", _with(_do_nothing), "p2p_communication 242, filesystem_async 230, timers"),
        Patch(cuda, "get_rng_state", _with(_get_rng_state), "tensor_parallel/random 235: read the tracker's state"),
        Patch("torch.cuda.random", "get_rng_state", _with(_get_rng_state), "tensor_parallel/random 55, same"),
        Patch(cuda, "manual_seed", _with(torch.manual_seed), "random 237; unpatched it is queued and never runs"),
        Patch("torch.Tensor", "cuda", _with(lambda tensor, *args, **kwargs: tensor), "language_module 244, rope, 1089"),
        Patch(
            "torch.Tensor", "type", _cuda_type, "clip_grads 167 and optimizers sort tensors by 'torch.cuda.FloatTensor'"
        ),
        Patch(cuda, "Stream", _with(_Stream), "moe/token_dispatcher: alltoall creates a side stream"),
        Patch(cuda, "current_stream", _with(lambda *args: _Stream()), "moe/token_dispatcher waits for it"),
        Patch(cuda, "default_stream", _with(lambda *args: _Stream()), "moe/token_dispatcher waits for it"),
        Patch(cuda, "stream", _with(lambda stream: contextlib.nullcontext()), "moe/token_dispatcher runs under it"),
    )


def _factory_patches() -> tuple[Patch, ...]:
    why = {
        "tensor": "optimizer 473, 485, 907; grad_scaler; rerun_state_machine",
        "zeros": "clip_grads 103-207; schedules 596, 983, 2138",
        "ones": "transformer/utils 35: default causal mask",
        "empty": "exchange_utils 104-336: fully parallel load",
        "empty_like": "exchange_utils 104-336: fully parallel load",
    }
    return tuple(Patch("torch", name, _on_cpu, f"uses device='cuda': {reason}") for name, reason in why.items())


def _megatron_patches() -> tuple[Patch, ...]:
    layers = "megatron.core.tensor_parallel.layers"
    buffers = "megatron.core.distributed.param_and_grad_buffer"
    return (
        Patch(
            "megatron.core.tensor_parallel.random",
            "_set_cuda_rng_state",
            _with(lambda state, *args, **kwargs: torch.set_rng_state(state)),
            "random 240, 255, 277; unpatched it is queued and never runs: dropout loses its seed without an error",
        ),
        Patch(
            layers,
            "fused_weight_gradient_mlp_cuda",
            _with(SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate, wgrad_gemm_accum_fp16=_accumulate)),
            "layers 596: weight gradients go straight into main_grad, which saves one pass over all gradients",
        ),
        Patch(layers, "_grad_accum_fusion_available", _with(True), "layers 920: enables the patch above"),
        Patch(
            buffers,
            "dist_reduce_scatter_func",
            _skip_if_alone,
            "443: gloo copies all gradients twice in a group of one",
        ),
        Patch(buffers, "dist_all_gather_func", _skip_if_alone, "285: gloo copies all parameters in a group of one"),
    )


def _expert_patches() -> tuple[Patch, ...]:
    moe, mappings = "megatron.core.transformer.moe", "megatron.core.tensor_parallel.mappings"
    uneven = "with TP and EP the router decides how many tokens each tensor rank has; gloo needs even sizes"
    return (
        Patch(f"{moe}.moe_utils", "te_general_gemm", lambda original: original, "router gemm: NameError without TE"),
        Patch(
            f"{moe}.token_dispatcher", "maybe_move_tensor_to_cpu", _splits_as_numpy, "all_to_all needs splits as ints"
        ),
        Patch(mappings, "_gather_along_first_dim", _gather_uneven, f"150: {uneven}"),
        Patch(mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_uneven, f"196: {uneven}"),
    )


class _Stream:
    """Replaces CUDA streams and events on CPU, where all work is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def record_event(self, event: Any = None) -> "_Stream":
        """Return this object as the event: its `wait` does nothing."""
        return self

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""


def _with(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _cuda_type(original: Any) -> Any:
    @functools.wraps(original)
    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(tensor, *args, **kwargs)
        return "torch.cuda." + original(tensor).removeprefix("torch.")

    return type_name


def _on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        tensor: torch.Tensor = original(*args, **kwargs)
        return tensor

    return factory


def _accumulate(inputs_TI: torch.Tensor, grad_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """Add the weight gradient grad^T x inputs to `main_grad` in place, in one matrix product where types allow."""
    if main_grad_OI.dtype == inputs_TI.dtype == grad_TO.dtype:
        main_grad_OI.addmm_(grad_TO.t(), inputs_TI)
    else:
        main_grad_OI.add_(grad_TO.t().matmul(inputs_TI))


def _skip_if_alone(original: Any) -> Any:
    @functools.wraps(original)
    def collective(output: torch.Tensor, local: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron-Core's shard is a view of the buffer: in a group of one, it is the whole buffer.
        same = output.data_ptr() == local.data_ptr() and output.numel() == local.numel()
        if same and not kwargs.get("async_op", False):
            return None
        return original(output, local, *args, **kwargs)

    return collective


def _splits_as_numpy(original: Any) -> Any:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    return move


def _gather_uneven(original: Any) -> Any:
    @functools.wraps(original)
    def gather(
        local: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            gathered: torch.Tensor = original(local, group, output_split_sizes, use_global_buffer)
            return gathered
        padded = local.new_zeros(max(output_split_sizes), *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather


def _reduce_scatter_uneven(original: Any) -> Any:
    @functools.wraps(original)
    def reduce_scatter(
        local: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            scattered: torch.Tensor = original(local, group, input_split_sizes, use_global_buffer)
            return scattered
        total = local.clone()
        torch.distributed.all_reduce(total, group=group)
        own_part: torch.Tensor = torch.split(total, input_split_sizes)[group.rank()]
        return own_part.contiguous()

    return reduce_scatter
