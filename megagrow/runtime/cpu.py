"""Megatron-Core on a machine without CUDA: named attributes replaced, each for a reason, and nothing else.

Megatron-Core reaches for the current CUDA device in a few dozen places. Each of them goes through one of the
attributes in the table below, so replacing just these attributes is enough, and tests on a laptop run the very
code that runs on a cluster. The alternative, a `TorchFunctionMode`, costs 5 microseconds on every torch call and
ends at the border of a thread. Where CUDA is available, `install` returns before it touches anything.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

_MARK = "__megagrow_cpu__"


@dataclass(frozen=True)
class Patch:
    """One attribute that is replaced: `make` gets the original (None if there is none) and returns the stand-in."""

    owner: str
    name: str
    make: Callable[[Any], Any]
    why: str

    @property
    def label(self) -> str:
        """Dotted name of the attribute."""
        return f"{self.owner}.{self.name}"


def install() -> tuple[str, ...]:
    """Replace what Megatron-Core needs on CPU and return the dotted names; () with CUDA or when done before."""
    if torch.cuda.is_available():
        return ()
    return tuple(row.label for row in rows() if _replace(row))


def rows() -> tuple[Patch, ...]:
    """The whole table. Line numbers in the reasons are those of megatron-core 0.16.1, under megatron/core."""
    return (*_device_rows(), *_factory_rows(), *_megatron_rows(), *_expert_rows())


def owner_of(row: Patch) -> Any:
    """The module or class that holds a row's attribute."""
    try:
        return importlib.import_module(row.owner)
    except ModuleNotFoundError:
        module, _, name = row.owner.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _replace(row: Patch) -> bool:
    owner = owner_of(row)
    done = vars(owner).get(_MARK, frozenset())
    if row.name in done:
        return False
    setattr(owner, row.name, row.make(getattr(owner, row.name, None)))
    setattr(owner, _MARK, done | {row.name})
    return True


def _device_rows() -> tuple[Patch, ...]:
    cuda = "torch.cuda"
    return (
        Patch(cuda, "current_device", _always(lambda: torch.device("cpu")), "DDP buffers, rope, p2p, utils 631"),
        Patch(cuda, "synchronize", _always(_nothing), "p2p_communication 242, filesystem_async 230, timers"),
        Patch(cuda, "get_rng_state", _always(_get_rng_state), "tensor_parallel/random 235: read the tracker's state"),
        Patch("torch.cuda.random", "get_rng_state", _always(_get_rng_state), "tensor_parallel/random 55, same"),
        Patch(cuda, "manual_seed", _always(torch.manual_seed), "random 237; unpatched it is queued and never runs"),
        Patch(
            "torch.Tensor", "cuda", _always(lambda tensor, *args, **kwargs: tensor), "language_module 244, rope, 1089"
        ),
        Patch(
            "torch.Tensor", "type", _cuda_type, "clip_grads 167 and optimizers sort tensors by 'torch.cuda.FloatTensor'"
        ),
        Patch(cuda, "Stream", _always(_Stream), "moe/token_dispatcher: alltoall makes a side stream"),
        Patch(cuda, "current_stream", _always(lambda *args: _Stream()), "moe/token_dispatcher waits for it"),
        Patch(cuda, "default_stream", _always(lambda *args: _Stream()), "moe/token_dispatcher waits for it"),
        Patch(cuda, "stream", _always(lambda stream: contextlib.nullcontext()), "moe/token_dispatcher runs under it"),
    )


def _factory_rows() -> tuple[Patch, ...]:
    why = {
        "tensor": "optimizer 473, 485, 907; grad_scaler; rerun_state_machine",
        "zeros": "clip_grads 103-207; schedules 596, 983, 2138",
        "ones": "transformer/utils 35: default causal mask",
        "empty": "exchange_utils 104-336: fully parallel load",
        "empty_like": "exchange_utils 104-336: fully parallel load",
    }
    return tuple(Patch("torch", name, _on_cpu, f"asks for device='cuda': {reason}") for name, reason in why.items())


def _megatron_rows() -> tuple[Patch, ...]:
    layers = "megatron.core.tensor_parallel.layers"
    buffers = "megatron.core.distributed.param_and_grad_buffer"
    return (
        Patch(
            "megatron.core.tensor_parallel.random",
            "_set_cuda_rng_state",
            _always(lambda state, *args, **kwargs: torch.set_rng_state(state)),
            "random 240, 255, 277; unpatched it is queued and never runs: dropout loses its seed without an error",
        ),
        Patch(
            layers,
            "fused_weight_gradient_mlp_cuda",
            _always(SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate, wgrad_gemm_accum_fp16=_accumulate)),
            "layers 596: weight gradients go straight into main_grad, which saves one pass over all gradients",
        ),
        Patch(layers, "_grad_accum_fusion_available", _always(True), "layers 920: says that the row above is there"),
        Patch(
            buffers, "dist_reduce_scatter_func", _skip_alone, "443: gloo copies all gradients twice in a group of one"
        ),
        Patch(buffers, "dist_all_gather_func", _skip_alone, "285: gloo copies all parameters in a group of one"),
    )


def _expert_rows() -> tuple[Patch, ...]:
    moe, mappings = "megatron.core.transformer.moe", "megatron.core.tensor_parallel.mappings"
    uneven = "with TP and EP each tensor rank has as many tokens as the router sends; gloo wants even sizes"
    return (
        Patch(f"{moe}.moe_utils", "te_general_gemm", lambda original: original, "router gemm: NameError without TE"),
        Patch(f"{moe}.token_dispatcher", "maybe_move_tensor_to_cpu", _numpy_on_cpu, "all_to_all wants splits as ints"),
        Patch(mappings, "_gather_along_first_dim", _gather_uneven, f"150: {uneven}"),
        Patch(mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_uneven, f"196: {uneven}"),
    )


class _Stream:
    """A CUDA stream on a machine where all work is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing is left to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing is left to wait for."""

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def record_event(self, event: Any = None) -> "_Stream":
        """An event is waited for as a stream is: not at all."""
        return self

    def wait(self, stream: Any = None) -> None:
        """Nothing is left to wait for."""


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _nothing(*args: Any, **kwargs: Any) -> None:
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
        return original(*args, **kwargs)

    return factory


def _accumulate(inputs_TI: torch.Tensor, grad_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    """Add the weight gradient grad^T x inputs to `main_grad` in place, in one matrix product where types allow."""
    if main_grad_OI.dtype == inputs_TI.dtype == grad_TO.dtype:
        main_grad_OI.addmm_(grad_TO.t(), inputs_TI)
    else:
        main_grad_OI.add_(grad_TO.t().matmul(inputs_TI))


def _skip_alone(original: Any) -> Any:
    @functools.wraps(original)
    def collective(output: torch.Tensor, local: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron-Core's shard is a view of the whole buffer: alone in the group, it is the whole buffer.
        same = output.data_ptr() == local.data_ptr() and output.numel() == local.numel()
        if same and not kwargs.get("async_op", False):
            return None
        return original(output, local, *args, **kwargs)

    return collective


def _numpy_on_cpu(original: Any) -> Any:
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
        return torch.split(total, input_split_sizes)[group.rank()].contiguous()

    return reduce_scatter
