"""Compares a source's weights with the optimizer's masters, because a conversion makes the first from the second.

A source whose masters are not its weights would become another model. Megatron-Core writes such ones: it saves a
`fully_reshardable` optimizer shifted where a buffer has several padded buckets. So does whoever edits weights and
leaves the optimizer as it was. A few values of every layer are compared here; `verify` compares all.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from megagrow.checkpoint.index import Box, DType, Raw, Source, TensorInfo, slice_text
from megagrow.checkpoint.tensors import optimizer_key, tensor_kinds
from megagrow.config import ModelShape

_FLOATS = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32, DType.FLOAT64)
_COMPARED = 64
"""Values at the start of each tensor of each layer that are compared."""
_ROUNDING = {DType.BFLOAT16: 2.0**-7, DType.FLOAT16: 2.0**-10, DType.FLOAT32: 2.0**-23}
"""Largest relative difference that storing a master in a type makes, whichever way it is rounded."""
_QUANTIZED = 0.25
"""Largest difference that storing masters in 4 bits makes, relative to the largest of them."""
_SMALLEST = {DType.BFLOAT16: 1e-37, DType.FLOAT16: 6e-8, DType.FLOAT32: 1e-37}
"""Spacing of the smallest numbers of a type."""


def has_masters(tensors: Mapping[str, TensorInfo], shape: ModelShape) -> bool:
    """Whether an index has a master of every weight of a shape."""
    keys = {kind.key: kind.global_shape(shape) for kind in tensor_kinds(shape)}
    masters = ((tensors.get(optimizer_key("param", key)), size) for key, size in keys.items())
    return all(info is not None and info.shape == size for info, size in masters)


def differing_master(source: Source, shape: ModelShape, *, quantized: bool = False) -> str | None:
    """Return the first tensor and slice whose masters are not the model's weights, None if all agree.

    Args:
        source: a checkpoint with masters of all weights.
        shape: of its model.
        quantized: whether its weights were rounded to 8 bits or fewer, which they do not show.
    """
    for kind in tensor_kinds(shape):
        master = optimizer_key("param", kind.key)
        weights, masters = source.tensors.get(kind.key), source.tensors[master]
        if weights is None or weights.shape != masters.shape:
            continue  # another check names what is wrong
        if weights.dtype not in _ROUNDING or masters.dtype not in _FLOATS:
            continue
        for box in _samples(kind.global_shape(shape), kind.per_layer + kind.per_expert):
            one = _values(source.raw(kind.key, box), weights.dtype)
            other = _values(source.raw(master, box), masters.dtype)
            allowed = _ROUNDING[weights.dtype] * np.abs(other) + _SMALLEST[weights.dtype]
            if quantized:
                allowed = np.maximum(allowed, _QUANTIZED * np.abs(other).max())
            same = (np.abs(one - other) <= allowed) | (one == other) | (np.isnan(one) & np.isnan(other))
            if not same.all():
                return f"{kind.key}{slice_text(box)}"
    return None


def _values(raw: Raw, dtype: DType) -> NDArray[np.float64]:
    """Return bit patterns as numbers."""
    if dtype is DType.BFLOAT16:  # the upper half of a float32
        raw = raw.astype(np.int32) << 16
        return raw.view(np.float32).astype(np.float64)
    return raw.view(str(dtype)).astype(np.float64)


def _samples(shape: tuple[int, ...], stacked: int) -> Iterator[Box]:
    """Yield a box at the start of each layer's tensor, and of its first and its last expert."""
    inner = shape[stacked:]
    box = (*((0, 1) for _ in inner[:-1]), (0, min(inner[-1], _COMPARED)))
    layers = range(shape[0]) if stacked else [None]
    experts = sorted({0, shape[1] - 1}) if stacked > 1 else [None]
    for layer in layers:
        for expert in experts:
            yield (*((at, at + 1) for at in (layer, expert) if at is not None), *box)
