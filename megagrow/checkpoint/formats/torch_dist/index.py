"""The index of a torch_dist checkpoint, `.metadata`: a pickle of torch's own dataclasses, without torch's classes.

Reading makes stand-ins of the few classes that such an index holds, so nothing is imported and nothing can be run.
Writing is `dcp_pickle`'s.
"""

import io
import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from megagrow.checkpoint.formats.megatron_common import unflattened
from megagrow.checkpoint.index import Chunk, DType, TensorInfo
from megagrow.checkpoint.pickles import check_pickle
from megagrow.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILES = "torch.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"


class _Any:
    """Stands for an object of a class that is never looked at, or whose fields are read as they come."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments


class _Tensor(_Any):
    """TensorStorageMetadata: properties, size, chunks."""


class _Bytes(_Any):
    """BytesStorageMetadata."""


class _Properties(_Any):
    """TensorProperties, which pickles as a tuple that begins with the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state["dtype"]


class _Index(_Any):
    """MetadataIndex: fqn, offset; what `storage_data` goes by."""

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and self._name == other._name

    @property
    def _name(self) -> tuple[Any, ...]:
        return (self.__dict__["fqn"], self.__dict__.get("offset"))


def _member(owner: Any, name: Any) -> Any:
    """A member of an enum, which Python 3.11.0 to 3.11.3 pickle as `getattr(enum, name)`."""
    if owner is not _Any or not isinstance(name, str):
        raise CheckpointError("refused: it would import builtins.getattr, which no checkpoint needs")
    return _Any()


_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Any,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Any,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "StorageMeta"): _Any,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Any,
    (_FILES, "_StorageInfo"): _Any,
    (_FILES, "_StoragePrefix"): _Any,
    (_PLANNER, "SavePlan"): _Any,
    (_PLANNER, "WriteItem"): _Any,
    (_PLANNER, "WriteItemType"): _Any,
    (_PLANNER, "TensorWriteData"): _Any,
    (_MEGATRON, "MCoreMetadata"): _Any,  # up to 0.15
    (_MEGATRON, "MCoreSavePlan"): _Any,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Any,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "getattr"): _member,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
    **{("torch", str(dtype)): dtype for dtype in DType},
}


class _Restricted(pickle.Unpickler):
    """An unpickler that imports nothing and knows the stand-ins only."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            wanted = " ".join(f"{module}.{name}".split())
            raise CheckpointError(f"{self._path}: refused: it would import {wanted}, which no checkpoint needs")
        return _ALLOWED[module, name]


def read_index(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Chunk]]:
    """Return the tensors and the objects of an index, by raw key; CheckpointError if it is damaged or foreign."""
    try:
        content = path.read_bytes()
        check_pickle(content)
        metadata = _Restricted(io.BytesIO(content), path).load()
        tensors: dict[str, TensorInfo] = {}
        objects: dict[str, Chunk] = {}
        for key, item in metadata.state_dict_metadata.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is {reprlib.repr(key)}")
            if isinstance(item, _Tensor):
                tensors[key] = unflattened(_tensor(metadata.storage_data, key, item), _original(metadata, key))
            else:
                objects[key] = _placed((), metadata.storage_data[_index(key, None)])
        return tensors, objects
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises nearly anything, and one that is whole may hold anything
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _tensor(storage: Any, key: str, item: Any) -> TensorInfo:
    dtype = item.properties.dtype
    if not isinstance(dtype, DType):
        raise TypeError(f"{key}: its dtype is {reprlib.repr(dtype)}")
    chunks = []
    for chunk in item.chunks:
        starts, lengths = _numbers(chunk.offsets), _numbers(chunk.sizes)
        box = tuple((start, start + size) for start, size in zip(starts, lengths, strict=True))
        placed = _placed(box, storage[_index(key, starts)])
        volume = dtype.itemsize
        for size in lengths:
            volume *= size
        if volume > placed.length:  # so no more memory is asked for than there is on disk
            raise ValueError(f"{key}: a chunk of {lengths} cannot lie in {placed.length} bytes")
        chunks.append(placed)
    return TensorInfo(_numbers(item.size), dtype, tuple(chunks))


def _original(metadata: Any, key: str) -> tuple[int, ...] | None:
    """Shape of a tensor that Megatron-Core up to 0.15 flattened over data-parallel ranks; None for any other."""
    notes = (getattr(metadata, "mcore_data", None) or {}).get(key) or {}
    shape = notes.get("nd_reformulated_orig_global_shape")
    return None if shape is None else _numbers(shape)


def _index(key: str, offset: Any) -> _Index:
    index = _Index()
    index.__dict__.update(fqn=key, offset=offset)
    return index


def _placed(box: tuple[tuple[int, int], ...], where: Any) -> Chunk:
    offset, length = _numbers((where.offset, where.length))
    if not isinstance(where.relative_path, str):
        raise TypeError(f"a file name is {reprlib.repr(where.relative_path)}")
    return Chunk(box, where.relative_path, offset, length, archive=True)


def _numbers(values: Iterable[int]) -> tuple[int, ...]:
    """Values as they must be in an index: whole and not negative."""
    numbers = tuple(values)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError(f"{reprlib.repr(numbers)} are no sizes")
    return numbers
