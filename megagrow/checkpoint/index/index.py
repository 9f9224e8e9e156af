"""The common view of every checkpoint: an index of named tensors, each a set of chunks stored in files.

Reading a format means building this index: for every canonical tensor (`tensors.table`), which box of it is stored
where, in bytes and strides. That covers tensors that are stacked or one per layer, whole or cut over ranks,
transposed, fused from several, or packed end to end in a flat buffer. Values are read only when a slice is requested
(`reading.ChunkReader`), and no checkpoint is ever loaded whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from megagrow.checkpoint.index.box import Box
from megagrow.checkpoint.index.dtypes import DType, Raw, common_dtype
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, and where its values are stored.

    Attributes:
        box: the part, in the global tensor.
        path: the file, relative to the checkpoint's directory.
        offset: byte of the file at which the values, or the archive that contains them, begin.
        length: length of the archive, or of the values, in bytes.
        archive: whether the file has a torch.save archive of one tensor there, not bare values.
        start: number of values to skip to the first one of the box.
        strides: values from one entry to the next in each dimension of the box; None: row by row without gaps,
            and an archived tensor is exactly the box (except for dimensions of length 1).
        dtype: type of the values, where a stack has parts of several types; None: the tensor's.
    """

    box: Box
    path: str
    offset: int
    length: int
    archive: bool = False
    start: int = 0
    strides: tuple[int, ...] | None = None
    dtype: DType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint. Chunks of a narrower type are widened when they are read."""

    shape: tuple[int, ...]
    dtype: DType
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_of_chunks(where: str, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> TensorInfo:
    """Return a tensor of chunks that all name their type; CheckpointError if no type holds all values exactly."""
    types = {chunk.dtype for chunk in chunks if chunk.dtype is not None}
    dtype = common_dtype(types)
    if dtype is None:
        raise CheckpointError(f"{where}: its parts are {', '.join(sorted(map(str, types)))}: no type holds all of them")
    return TensorInfo(
        shape, dtype, tuple(replace(chunk, dtype=None) if chunk.dtype is dtype else chunk for chunk in chunks)
    )


class Source(Protocol):
    """A set of tensors that are read by slice."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The index, by canonical key."""

    def read(self, key: str, box: Box) -> "Tensor":
        """Return the values of a box of a tensor, contiguous, in the tensor's dtype."""

    def raw(self, key: str, box: Box) -> Raw:
        """Like `read`, but returns the raw bit patterns as integers, without torch."""

    def forget(self, key: str, box: Box) -> None:
        """Release what is cached of a box, which will not be read again."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint of any format, ready to be read by slice under canonical keys.

    Attributes:
        format: name of its format for the user: "Megatron torch_dist", "Hugging Face (llama)".
        source: its tensors.
        shape: the model's shape; None where the checkpoint does not record it.
        layout: the layout that it was written in; None where that cannot be seen.
        common: the state that is not sharded, under Megatron's names: iteration, optimizer with param_groups, ...
        notes: notes for the user: what was cast, padded or left out.
    """

    format: str
    source: Source
    shape: ModelShape | None
    layout: ParallelLayout | None
    common: Mapping[str, Any]
    notes: tuple[str, ...] = ()
