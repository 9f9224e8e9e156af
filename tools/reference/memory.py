"""A store in memory, with the same two faces as one on disk: for proofs, and for models that are already there."""

from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.index import Box, Chunk, DType, Raw, TensorInfo, raw_of, whole_box


class MemoryStore:
    """Whole tensors by key, read by slice and written by chunk."""

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values: dict[str, Tensor] = dict(values or {})
        self.objects: dict[str, Any] = {}

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The index, one chunk a tensor."""
        return {
            key: TensorInfo(
                tuple(v.shape), DType.of(v.dtype), (Chunk(whole_box(v.shape), "", 0, v.numel() * v.itemsize),)
            )
            for key, v in self.values.items()
        }

    def read(self, key: str, box: Box) -> Tensor:
        """Return the values of a box of a tensor."""
        return self.values[key][tuple(slice(start, stop) for start, stop in box)].clone()

    def raw(self, key: str, box: Box) -> Raw:
        """Return the same as integers."""
        return raw_of(self.read(key, box))

    def forget(self, key: str, box: Box) -> None:
        """Values in memory stay."""

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor) -> None:
        """Add a chunk of the tensor `key` of global `shape`, whose first entry lies at `offset`."""
        if key not in self.values:
            self.values[key] = torch.full(shape, torch.nan, dtype=values.dtype)
        box = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        self.values[key][box] = values

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""
        self.objects[key] = value
