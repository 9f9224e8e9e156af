"""torch's index of a checkpoint, pickled without torch's classes (`torch_pickle`): stand-ins have their fields."""

from collections.abc import Sequence
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import dumps

_METADATA = "torch.distributed.checkpoint.metadata"
_THEIRS = {
    "Metadata": (_METADATA, "Metadata"),
    "MetadataIndex": (_METADATA, "MetadataIndex"),
    "TensorStorageMetadata": (_METADATA, "TensorStorageMetadata"),
    "TensorProperties": (_METADATA, "TensorProperties"),
    "ChunkStorageMetadata": (_METADATA, "ChunkStorageMetadata"),
    "BytesStorageMetadata": (_METADATA, "BytesStorageMetadata"),
    "MemoryFormat": (_METADATA, "_MEM_FORMAT_ENCODING"),
    "StorageInfo": ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    "Size": ("torch", "Size"),
    "get_layout": ("torch.serialization", "_get_layout"),
}
"""Module and name of what each name of this module stands for."""


class Size(tuple[int, ...]):
    """A shape."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Size, (tuple(self),)


def get_layout(name: str) -> "Layout":
    """A memory layout by its name."""
    return Layout(name)


class Layout:
    """A memory layout: of all that is indexed here `torch.strided`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return get_layout, (self._name,)


_STRIDED = Layout("torch.strided")


class Metadata:
    """What tensors and objects there are, and where each piece lies."""

    def __init__(self, state_dict_metadata: dict[str, Any], storage_data: dict[Any, Any]) -> None:
        self.state_dict_metadata = state_dict_metadata
        self.planner_data = None
        self.storage_data = storage_data
        self.storage_meta = None
        self.version = None


class MetadataIndex:
    """Names a piece: the key, and where it begins in its tensor."""

    def __init__(self, fqn: str, offset: Sequence[int] | None = None) -> None:
        self.fqn = fqn
        self.index = None
        if offset is not None:
            self.offset = Size(offset)


class TensorStorageMetadata:
    """A tensor and its pieces."""

    def __init__(self, dtype: DType, size: Sequence[int]) -> None:
        self.properties = TensorProperties(dtype)
        self.size = Size(size)
        self.chunks: list[ChunkStorageMetadata] = []


class TensorProperties:
    """A tensor's type; all else that torch notes of it is as it always is."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype

    def __getstate__(self) -> tuple[Any, ...]:
        return self._dtype, _STRIDED, False, MemoryFormat(0), False


class ChunkStorageMetadata:
    """A piece of a tensor."""

    def __init__(self, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        self.offsets = Size(offsets)
        self.sizes = Size(sizes)


class BytesStorageMetadata:
    """A small object."""


class MemoryFormat:
    """One of the formats that torch numbers; 0 is contiguous."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryFormat, (self._value,)


class StorageInfo:
    """Where a piece lies."""

    def __init__(self, relative_path: str, offset: int, length: int) -> None:
        self.relative_path = relative_path
        self.offset = offset
        self.length = length


def dump(metadata: Metadata) -> bytes:
    """The pickle of an index, as torch's FileSystemReader reads it; ValueError where a key looks like a class in it."""
    return dumps(metadata, {(__name__, ours): theirs for ours, theirs in _THEIRS.items()})
