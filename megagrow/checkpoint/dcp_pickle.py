"""torch's index of a checkpoint, pickled without torch's classes: importing those takes 0.7 s here.

The stand-ins below have the fields of torch's dataclasses, and are pickled as what they are: classes of this module. In
pickle's protocol 2 a class is written once, as two plain lines, its module's name and its own: they are exchanged.
A test reads the result with torch's own classes.
"""

import pickle
from collections.abc import Sequence
from typing import Any

import torch

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
}
"""Module and name of the class that each class of this module stands for."""


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
            self.offset = torch.Size(offset)


class TensorStorageMetadata:
    """A tensor and its pieces."""

    def __init__(self, dtype: torch.dtype, size: Sequence[int]) -> None:
        self.properties = TensorProperties(dtype)
        self.size = torch.Size(size)
        self.chunks: list[ChunkStorageMetadata] = []


class TensorProperties:
    """A tensor's type; all else that torch notes of it is as it always is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __getstate__(self) -> tuple[Any, ...]:
        return self._dtype, torch.strided, False, MemoryFormat(0), False


class ChunkStorageMetadata:
    """A piece of a tensor."""

    def __init__(self, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        self.offsets = torch.Size(offsets)
        self.sizes = torch.Size(sizes)


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
    content = pickle.dumps(metadata, protocol=2)
    for ours, (module, theirs) in _THEIRS.items():
        here, there = f"c{__name__}\n{ours}\n".encode(), f"c{module}\n{theirs}\n".encode()
        if content.count(here) > 1:  # a class is written once: the other is a key that would be changed as well
            raise ValueError(f"a key of the checkpoint looks like a pickled class: {here!r}")
        content = content.replace(here, there)
    return content
