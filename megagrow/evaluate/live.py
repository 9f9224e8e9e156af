"""A whole checkpoint as one live Megatron-Core model, whatever layout it was written in.

The weights are read by slice straight into the model's parameters: no distributed load, and no optimizer but the
moments that are asked for. In float64 Megatron-Core runs as it is once its parameters are. The masters are loaded
where there are any: they are what the model is, and its own weights are those, rounded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megagrow.checkpoint.index import Box, TensorInfo
from megagrow.checkpoint.tensors import kinds, optimizer_key
from megagrow.config import ModelShape, ParallelLayout
from megagrow.model.gpt import build_model

Precision = Literal["fp64", "fp32"]
ParameterAddress = tuple[str, tuple[int, ...]]
"""Canonical key of one parameter, and its place in what the checkpoint stacks: layer, or layer and expert."""

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


class TensorSource(Protocol):
    """A store that is read by slice."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The index."""

    def read(self, key: str, box: Box) -> Tensor:
        """Return the values of a box of a tensor."""


@dataclass(frozen=True)
class TokenBatch:
    """Tokens and the tokens that follow them, both [b, s]."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ForwardResult:
    """What a forward pass computed: logits [b, s, padded vocabulary], mean loss in nats, RMS of the residual stream
    after the embedding and after each layer."""

    logits: Tensor
    loss: Tensor
    residual: tuple[float, ...]


class LiveModel:
    """A checkpoint's model in this process; `megagrow.runtime.start` must have run.

    Attributes:
        shape: of the model.
        parameters: by canonical key and place.
    """

    def __init__(self, shape: ModelShape, source: TensorSource, precision: Precision) -> None:
        """Build the model of a shape and fill it; CheckpointError where a tensor cannot be read."""
        self.shape, self._source = shape, source
        (chunk,) = build_model(shape, ParallelLayout(), precision="fp32", accumulate_in_place=False)
        self._chunk = chunk.to(_DTYPES[precision]).eval()  # no dropout: a proof is about one function
        self.parameters = dict(_parameters(chunk))
        self._kinds = {kind.key: kind for kind in kinds(shape)}
        with torch.no_grad():
            for (key, place), parameter in self.parameters.items():
                parameter.copy_(self._read(master_key(source, key), place))

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
        """Run forward and backward; every parameter has its gradient afterwards."""
        for parameter in self.parameters.values():
            parameter.grad = None
        seen = self.forward(batch)
        seen.loss.backward()
        return seen

    def stacked(self, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Something of every parameter by canonical key, stacked as in the checkpoint, copied to the CPU."""
        stacks: dict[str, Tensor] = {}
        with torch.no_grad():
            for (key, place), parameter in self.parameters.items():
                if key not in stacks:
                    stacks[key] = torch.empty(self._kinds[key].global_shape(self.shape), dtype=parameter.dtype)
                stacks[key][place] = value(parameter).cpu()
        return stacks

    def moment(self, state: str, address: ParameterAddress) -> Tensor:
        """One of Adam's moments, in the model's type; zeros where the checkpoint has none."""
        key, place = address
        parameter = self.parameters[address]
        if optimizer_key(state, key) not in self._source.tensors:
            return torch.zeros_like(parameter)
        return self._read(optimizer_key(state, key), place).to(parameter)

    def rounded_masters(self) -> bool:
        """Whether the checkpoint's own weights are its masters, rounded to their type."""
        for key, place in self.parameters:
            weights, master = self._read(key, place), self._read(master_key(self._source, key), place)
            if not torch.equal(weights, master.to(weights.dtype)):
                return False
        return True

    def _read(self, key: str, place: tuple[int, ...]) -> Tensor:
        sizes = self._source.tensors[key].shape
        inner: Box = tuple((0, size) for size in sizes[len(place) :])
        return self._source.read(key, (*((index, index + 1) for index in place), *inner)).view(sizes[len(place) :])


def master_key(source: TensorSource, key: str) -> str:
    """Key of a tensor's fp32 masters, or its own where the checkpoint has none."""
    master = optimizer_key("param", key)
    return master if master in source.tensors else key


def _parameters(chunk: Any) -> Iterator[tuple[ParameterAddress, Tensor]]:
    """The parameters of a whole model under their canonical keys, as Megatron-Core says them for its checkpoints."""
    parameters = dict(chunk.named_parameters())
    for name, piece in chunk.sharded_state_dict().items():
        if name in parameters:
            part = piece.build()[0] if hasattr(piece, "build") else piece  # a gated linear_fc1 is saved in two
            place = tuple(int(index) for index in part.global_offset[: part.prepend_axis_num])
            yield (piece.key, place), parameters[name]


def _rms_into(residual: list[float]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        residual.append(float(hidden.detach().double().square().mean().sqrt()))

    return hook
