"""What every checkpoint is to the converter: an index of named tensors, each a set of chunks that lie in files.

A format is read by making this index of it: for every canonical tensor (`names`), which box of it lies where, in
bytes and strides. That is enough for tensors that are stacked or one a layer, whole or cut over ranks, transposed,
fused of several, or packed end to end in a flat buffer. Values are only read when a slice is asked for
(`files.ChunkReader`), and no format is ever loaded whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megagrow.checkpoint.index.dtypes import DType, Raw
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
from megagrow.checkpoint.index.box import Box, intersect, text, volume


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor and where its values lie.

    Attributes:
        box: the part, in the global tensor.
        path: file, relative to the checkpoint's directory.
        offset: byte of the file where the values (or the archive with them) begin.
        length: bytes of the archive, or of the values.
        archive: whether a torch.save archive of one tensor lies there; else bare values.
        start: values to skip from there to the box's first one.
        strides: values from one entry to the next in each dimension of the box; None: row by row, nothing between,
            and an archived tensor is exactly the box (but for dimensions of length 1).
    """

    box: Box
    path: str
    offset: int
    length: int
    archive: bool = False
    start: int = 0
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: DType
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """A store that is read by slice."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Index by canonical key."""

    def read(self, key: str, box: Box) -> "Tensor":
        """Return the values of a box of a tensor, contiguous, in the tensor's dtype."""

    def raw(self, key: str, box: Box) -> Raw:
        """Return the same as integers of their size, for which torch is not needed."""

    def forget(self, key: str, box: Box) -> None:
        """Be told that a box will not be read again."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint of any format, found out and ready to be read by slice under canonical keys.

    Attributes:
        format: what it is, for people: "Megatron torch_dist", "Hugging Face (llama)".
        source: its tensors.
        shape: of the model; None where the checkpoint does not say.
        layout: that it was written in; None where that leaves no trace.
        common: what is not sharded, under Megatron's names: iteration, optimizer with param_groups, ...
        notes: what a person should know: what was cast, padded or left out.
    """

    format: str
    source: Source
    shape: ModelShape | None
    layout: ParallelLayout | None
    common: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def check_cover(where: str, info: TensorInfo) -> None:
    """Raise CheckpointError unless the chunks cover a tensor exactly once.

    They do if they lie inside, hold as many values as it has, and no two of them meet. Sorted by their first
    dimension only a few at a time can meet.
    """
    for chunk in info.chunks:
        if len(chunk.box) != len(info.shape) or any(
            b > size for (_, b), size in zip(chunk.box, info.shape, strict=True)
        ):
            raise CheckpointError(f"{where}: chunk {text(chunk.box)} lies outside {info.shape}")
    held, wanted = sum(volume(chunk.box) for chunk in info.chunks), math.prod(info.shape)
    if held != wanted:
        raise CheckpointError(f"{where}: its chunks hold {held} of {wanted} values")
    near: list[Box] = []
    for box in sorted(chunk.box for chunk in info.chunks):
        near = [other for other in near if not box or other[0][1] > box[0][0]]
        for other in near:
            if intersect(box, other):
                raise CheckpointError(f"{where}: chunks {text(other)} and {text(box)} overlap")
        near.append(box)
