"""Read the index of a torch_dist checkpoint, `.metadata`, without torch: it is a pickle of torch's dataclasses.

The few classes that such an index contains are replaced by stand-ins, so nothing is imported and nothing can be run.
Writing is done by `index_write`.
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


class _StandIn:
    """Stand-in for an object whose class does not matter: it is ignored, or its fields are read as they are."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments


class _TensorEntry(_StandIn):
    """TensorStorageMetadata, with fields properties, size and chunks."""


class _ObjectEntry(_StandIn):
    """BytesStorageMetadata."""


class _Properties(_StandIn):
    """TensorProperties, which is pickled as a tuple whose first item is the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state["dtype"]


class _PieceIndex(_StandIn):
    """MetadataIndex, the key of `storage_data`, with fields fqn and offset."""

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PieceIndex) and self._name == other._name

    @property
    def _name(self) -> tuple[Any, ...]:
        return (self.__dict__["fqn"], self.__dict__.get("offset"))


def _enum_member(owner: Any, name: Any) -> Any:
    """Stand-in for an enum member, which Python 3.11.0 to 3.11.3 pickle as `getattr(enum, name)`."""
    if owner is not _StandIn or not isinstance(name, str):
        raise CheckpointError("refused: it would import builtins.getattr, which no checkpoint needs")
    return _StandIn()


_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _StandIn,
    (_METADATA, "TensorStorageMetadata"): _TensorEntry,
    (_METADATA, "BytesStorageMetadata"): _ObjectEntry,
    (_METADATA, "ChunkStorageMetadata"): _StandIn,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _PieceIndex,
    (_METADATA, "StorageMeta"): _StandIn,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _StandIn,
    (_FILES, "_StorageInfo"): _StandIn,
    (_FILES, "_StoragePrefix"): _StandIn,
    (_PLANNER, "SavePlan"): _StandIn,
    (_PLANNER, "WriteItem"): _StandIn,
    (_PLANNER, "WriteItemType"): _StandIn,
    (_PLANNER, "TensorWriteData"): _StandIn,
    (_MEGATRON, "MCoreMetadata"): _StandIn,  # up to 0.15
    (_MEGATRON, "MCoreSavePlan"): _StandIn,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _StandIn,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "getattr"): _enum_member,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
    **{("torch", str(dtype)): dtype for dtype in DType},
}


class _Restricted(pickle.Unpickler):
    """An unpickler that imports nothing: every class is a stand-in, and any other name is refused."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            wanted = " ".join(f"{module}.{name}".split())
            raise CheckpointError(f"{self._path}: refused: it would import {wanted}, which no checkpoint needs")
        return _ALLOWED[module, name]


def read_index(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Chunk]]:
    """Return the tensors and the objects of an index by their stored keys; CheckpointError if damaged or unsafe."""
    try:
        content = path.read_bytes()
        check_pickle(content)
        metadata = _Restricted(io.BytesIO(content), path).load()
        tensors: dict[str, TensorInfo] = {}
        objects: dict[str, Chunk] = {}
        for key, item in metadata.state_dict_metadata.items():
            if not isinstance(key, str):
                raise TypeError(f"a key is {reprlib.repr(key)}")
            if isinstance(item, _TensorEntry):
                tensors[key] = unflattened(
                    _tensor_info(metadata.storage_data, key, item), _original_shape(metadata, key)
                )
            else:
                objects[key] = _chunk((), metadata.storage_data[_piece_index(key, None)])
        return tensors, objects
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything, and an intact one can contain anything
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _tensor_info(storage: Any, key: str, item: Any) -> TensorInfo:
    dtype = item.properties.dtype
    if not isinstance(dtype, DType):
        raise TypeError(f"{key}: its dtype is {reprlib.repr(dtype)}")
    chunks = []
    for chunk in item.chunks:
        starts, lengths = _numbers(chunk.offsets), _numbers(chunk.sizes)
        box = tuple((start, start + size) for start, size in zip(starts, lengths, strict=True))
        placed = _chunk(box, storage[_piece_index(key, starts)])
        volume = dtype.itemsize
        for size in lengths:
            volume *= size
        if volume > placed.length:  # ensures that no more memory is requested than there is on disk
            raise ValueError(f"{key}: a chunk of {lengths} does not fit in {placed.length} bytes")
        chunks.append(placed)
    return TensorInfo(_numbers(item.size), dtype, tuple(chunks))


def _original_shape(metadata: Any, key: str) -> tuple[int, ...] | None:
    """The original shape of a tensor that Megatron-Core up to 0.15 flattened over data-parallel ranks, else None."""
    entry = (getattr(metadata, "mcore_data", None) or {}).get(key) or {}
    shape = entry.get("nd_reformulated_orig_global_shape")
    return None if shape is None else _numbers(shape)


def _piece_index(key: str, offset: Any) -> _PieceIndex:
    index = _PieceIndex()
    index.__dict__.update(fqn=key, offset=offset)
    return index


def _chunk(box: tuple[tuple[int, int], ...], where: Any) -> Chunk:
    offset, length = _numbers((where.offset, where.length))
    if not isinstance(where.relative_path, str):
        raise TypeError(f"a file name is {reprlib.repr(where.relative_path)}")
    return Chunk(box, where.relative_path, offset, length, archive=True)


def _numbers(values: Iterable[int]) -> tuple[int, ...]:
    """Return values as a tuple; TypeError unless all are whole numbers and none is negative."""
    numbers = tuple(values)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError(f"{reprlib.repr(numbers)} are not sizes")
    return numbers
