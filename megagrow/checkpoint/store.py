"""What every checkpoint is to the converter: an index of named tensors, each a set of chunks that lie in files.

A format is read by making this index of it: for every canonical tensor (`names`), which box of it lies where, in
bytes and strides. That is enough for tensors that are stacked or one a layer, whole or cut over ranks, transposed,
fused of several, or packed end to end in a flat buffer. Values are only read when a slice is asked for
(`files.ChunkReader`), and no format is ever loaded whole.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megagrow.checkpoint.dtypes import DType, Raw
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""Start and stop in every dimension of a global tensor."""


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
class Opened:
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


@dataclass(frozen=True)
class OutputFile:
    """A file of a target, its size known before its first byte is written."""

    name: str
    size: int


class Production(Protocol):
    """A target directory planned to the byte: large files in units, any of which can be made alone and in any order.

    A unit's files always come out the same, so a unit that was interrupted is simply made again.
    """

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit."""

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (file of the unit, its next bytes), each file from its first byte to its last, without gaps.

        A buffer is used before the next one is asked for, so it may be used again.
        """


class Sink(Protocol):
    """A store that is written by piece."""

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: "Tensor") -> None:
        """Add a part of the tensor `key` of global `shape`, whose first entry lies at `offset`."""

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""


def whole(shape: Iterable[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """Lengths of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Values in a box."""
    return math.prod(stop - start for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes share; None if nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(a < b for a, b in common) else None


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in values, of a tensor that lies row by row."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * shape[dim]
    return tuple(strides)


def text(box: Box) -> str:
    """A box as people write slices."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


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
