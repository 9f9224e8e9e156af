"""Loads a whole checkpoint, written in any layout, into one Megatron-Core model in this process.

The weights are read by slice straight into the model's parameters, without a distributed load; of the optimizer only
requested moments are read. Megatron-Core runs in float64 without changes once its parameters are float64. fp32
masters are loaded where they exist: the checkpoint's own weights are the masters, rounded.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megagrow.checkpoint.index import Box, TensorInfo
from megagrow.checkpoint.tensors import optimizer_key, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from megagrow.model.gpt import build_model

ForwardPrecision = Literal["fp64", "fp32"]
ParameterAddress = tuple[str, tuple[int, ...]]
"""Canonical key of a parameter, and its index in the checkpoint's stack: (), (layer,) or (layer, expert)."""

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


class TensorSource(Protocol):
    """Tensors that can be read by slice."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The index of all tensors."""

    def read(self, key: str, box: Box) -> Tensor:
        """Return the values of a box of a tensor."""


@dataclass(frozen=True)
class TokenBatch:
    """Tokens, and the next tokens as labels, both [b, s]."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ForwardResult:
    """Result of a forward pass: logits [b, s, padded vocabulary], mean loss in nats, RMS of the residual stream after
    the embedding and after each layer."""

    logits: Tensor
    loss: Tensor
    residual: tuple[float, ...]


class LiveModel:
    """A checkpoint's model in this process; `megagrow.runtime.start` must have run.

    Attributes:
        shape: shape of the model.
        parameters: the model's parameters by address.
    """

    def __init__(self, shape: ModelShape, source: TensorSource, precision: ForwardPrecision) -> None:
        """Build the model of a shape and load its weights; CheckpointError if a tensor cannot be read."""
        self.shape, self._source = shape, source
        (chunk,) = build_model(shape, ParallelLayout(), precision="fp32", accumulate_in_place=False)
        self._chunk = chunk.to(_DTYPES[precision]).eval()  # no dropout: verification needs a deterministic function
        self.parameters = dict(_parameters(chunk))
        self._kinds = {kind.key: kind for kind in tensor_kinds(shape)}
        with torch.no_grad():
            for (key, index), parameter in self.parameters.items():
                parameter.copy_(self._read(master_key(source, key), index))

    def forward(self, batch: TokenBatch) -> ForwardResult:
        """Run the model on a batch."""
        residual: list[float] = []
        hooks = [self._chunk.embedding.register_forward_hook(_rms_into(residual))]
        hooks += [layer.register_forward_hook(_rms_into(residual)) for layer in self._chunk.decoder.layers]
        device = next(iter(self.parameters.values())).device
        tokens, labels = batch.tokens.to(device), batch.labels.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        try:
            logits = self._chunk(tokens, positions, None)
        finally:
            for hook in hooks:
                hook.remove()
        return ForwardResult(logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten()), tuple(residual))

    def gradients(self, batch: TokenBatch) -> ForwardResult:
        """Run forward and backward; afterwards every parameter has its gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None
        result = self.forward(batch)
        torch.autograd.backward(result.loss)
        return result

    def stacked(self, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return `value(parameter)` for all parameters by canonical key, stacked as in the checkpoint, on the CPU."""
        stacks: dict[str, Tensor] = {}
        with torch.no_grad():
            for (key, index), parameter in self.parameters.items():
                if key not in stacks:
                    stacks[key] = torch.empty(self._kinds[key].global_shape(self.shape), dtype=parameter.dtype)
                stacks[key][index] = value(parameter).cpu()
        return stacks

    def moment(self, state: str, address: ParameterAddress) -> Tensor:
        """Return one of Adam's moments, in the model's type; zeros where the checkpoint has none."""
        key, index = address
        parameter = self.parameters[address]
        if optimizer_key(state, key) not in self._source.tensors:
            return torch.zeros_like(parameter)
        return self._read(optimizer_key(state, key), index).to(parameter)

    def rounded_masters(self) -> bool:
        """Whether the checkpoint's own weights are its masters, rounded to their type."""
        for key, index in self.parameters:
            weights, master = self._read(key, index), self._read(master_key(self._source, key), index)
            if not torch.equal(weights, master.to(weights.dtype)):
                return False
        return True

    def _read(self, key: str, index: tuple[int, ...]) -> Tensor:
        sizes = self._source.tensors[key].shape
        inner: Box = tuple((0, size) for size in sizes[len(index) :])
        return self._source.read(key, (*((i, i + 1) for i in index), *inner)).view(sizes[len(index) :])


def master_key(source: TensorSource, key: str) -> str:
    """Return the key of a tensor's fp32 masters, or its own key where the checkpoint has none."""
    master = optimizer_key("param", key)
    return master if master in source.tensors else key


def _parameters(chunk: Any) -> Iterator[tuple[ParameterAddress, Tensor]]:
    """Yield a whole model's parameters with the addresses that Megatron-Core gives them in checkpoints."""
    parameters = dict(chunk.named_parameters())
    for name, sharded in chunk.sharded_state_dict().items():
        if name in parameters:
            tensor = sharded.build()[0] if hasattr(sharded, "build") else sharded  # a gated linear_fc1 is saved in two
            index = tuple(int(offset) for offset in tensor.global_offset[: tensor.prepend_axis_num])
            yield (sharded.key, index), parameters[name]


def _rms_into(residual: list[float]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        residual.append(float(hidden.detach().double().square().mean().sqrt()))

    return hook
