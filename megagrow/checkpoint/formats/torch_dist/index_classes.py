"""Classes with the fields of torch's index classes, to pickle an index without importing torch.

`dump` replaces their names by those of torch's classes (`pickles.dumps`), so torch unpickles its own objects.
"""

from collections.abc import Sequence
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import dumps

_METADATA = "torch.distributed.checkpoint.metadata"
_TORCH_NAMES = {
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
"""Module and name in torch of the class that each name of this module replaces."""


class Size(tuple[int, ...]):
    """torch.Size."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Size, (tuple(self),)


def get_layout(name: str) -> "Layout":
    """Return a memory layout by its name."""
    return Layout(name)


class Layout:
    """A memory layout; every tensor in an index of this package has `torch.strided`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return get_layout, (self._name,)


_STRIDED = Layout("torch.strided")


class Metadata:
    """The index: all tensors and objects, and where each piece is stored."""

    def __init__(self, state_dict_metadata: dict[str, Any], storage_data: dict[Any, Any]) -> None:
        self.state_dict_metadata = state_dict_metadata
        self.planner_data = None
        self.storage_data = storage_data
        self.storage_meta = None
        self.version = None


class MetadataIndex:
    """The name of a piece: its key, and for a chunk its first corner in the tensor."""

    def __init__(self, fqn: str, offset: Sequence[int] | None = None) -> None:
        self.fqn = fqn
        self.index = None
        if offset is not None:
            self.offset = Size(offset)


class TensorStorageMetadata:
    """A tensor and its chunks."""

    def __init__(self, dtype: DType, size: Sequence[int]) -> None:
        self.properties = TensorProperties(dtype)
        self.size = Size(size)
        self.chunks: list[ChunkStorageMetadata] = []


class TensorProperties:
    """A tensor's type; the other properties that torch records are constant here."""

    def __init__(self, dtype: DType) -> None:
        self._dtype = dtype

    def __getstate__(self) -> tuple[Any, ...]:
        return self._dtype, _STRIDED, False, MemoryFormat(0), False


class ChunkStorageMetadata:
    """A chunk of a tensor: its first corner and its sizes."""

    def __init__(self, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        self.offsets = Size(offsets)
        self.sizes = Size(sizes)


class BytesStorageMetadata:
    """A small object."""


class MemoryFormat:
    """A memory format by torch's number; 0 is contiguous."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryFormat, (self._value,)


class StorageInfo:
    """Where a piece is stored: file, offset and length."""

    def __init__(self, relative_path: str, offset: int, length: int) -> None:
        self.relative_path = relative_path
        self.offset = offset
        self.length = length


def dump(metadata: Metadata) -> bytes:
    """Return the pickle of an index for torch's FileSystemReader; ValueError if a key looks like a pickled class."""
    return dumps(metadata, {(__name__, name): torch_name for name, torch_name in _TORCH_NAMES.items()})
