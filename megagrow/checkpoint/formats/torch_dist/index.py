"""Read the index of a torch_dist checkpoint, `.metadata`, without torch: it is a pickle of torch's dataclasses.

The few classes that such an index contains are replaced by stand-ins, so nothing is imported and nothing can be run.
Writing is done by `index_write`.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import MAX_INDEX
from megagrow.checkpoint.formats.megatron_common import unflattened
from megagrow.checkpoint.index import Chunk, DType, TensorInfo
from megagrow.checkpoint.pickles import (
    ClosedUnpickler,
    Fixed,
    Function,
    StandIn,
    TypeName,
    check_pickle,
    stand_in_class,
)
from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_small

_MAX_KEY, _MAX_DIMENSIONS = 1000, 64
_FREE_CHUNKS = 1000
"""Chunks that an index may list beyond those that it places, before it is refused without looking at them."""
_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILES = "torch.distributed.checkpoint.filesystem"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"


class _TensorEntry(StandIn):
    """TensorStorageMetadata, with fields properties, size and chunks."""

    __slots__ = ()


class _Properties(StandIn):
    """TensorProperties, which is pickled as a tuple whose first item is the dtype."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.attributes = {"dtype": state[0]} if type(state) is tuple else state


class _PieceIndex(StandIn):
    """MetadataIndex, the key of `storage_data`, with fields fqn and offset. As a key it is equal only to itself."""

    __slots__ = ()


_CLASSES: Mapping[tuple[str, str], type[StandIn]] = {
    (_METADATA, "Metadata"): StandIn,
    (_METADATA, "TensorStorageMetadata"): _TensorEntry,
    (_METADATA, "BytesStorageMetadata"): StandIn,
    (_METADATA, "ChunkStorageMetadata"): StandIn,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "MetadataIndex"): _PieceIndex,
    (_METADATA, "StorageMeta"): StandIn,
    (_METADATA, "_MEM_FORMAT_ENCODING"): Fixed,
    (_FILES, "_StorageInfo"): StandIn,
    (_FILES, "_StoragePrefix"): StandIn,
    (_PLANNER, "SavePlan"): StandIn,
    (_PLANNER, "WriteItem"): StandIn,
    (_PLANNER, "WriteItemType"): Fixed,
    (_PLANNER, "TensorWriteData"): StandIn,
    (_MEGATRON, "MCoreMetadata"): StandIn,  # up to 0.15
    (_MEGATRON, "MCoreSavePlan"): StandIn,
    ("torch.serialization", "_get_layout"): Fixed,
    ("pathlib", "PosixPath"): Fixed,
    ("pathlib", "PurePosixPath"): Fixed,
}
_DTYPES = {str(dtype): dtype for dtype in DType}


class IndexUnpickler(ClosedUnpickler):
    """The unpickler of an index: every class is a stand-in, and any other name is refused."""

    because = ", which no checkpoint needs"

    def stand_in(self, module: str, name: str) -> Any:
        """Return what replaces a name; None for any name that no index needs."""
        if kind := _CLASSES.get((module, name)):
            return stand_in_class(f"{module}.{name}", kind)
        if module == "torch" and name in _DTYPES:
            return TypeName(_DTYPES[name])
        replacement = self._functions().get((module, name))
        return None if replacement is None else Function(replacement)

    def names(self) -> list[tuple[str, str]]:
        """Return the names of an index's parts."""
        return [*_CLASSES, *(("torch", name) for name in _DTYPES), *self._functions()]

    def _functions(self) -> dict[tuple[str, str], Callable[..., Any]]:
        return {
            ("torch", "Size"): self.size,
            ("collections", "OrderedDict"): self.table,
            ("builtins", "set"): self.members,
            ("builtins", "getattr"): _enum_member,
        }


def _enum_member(owner: Any, name: Any) -> Any:
    """Replaces `getattr(enum, name)`, as which Python 3.11.0 to 3.11.3 pickle a member of an enum."""
    if not (isinstance(owner, type) and issubclass(owner, Fixed)) or type(name) is not str:
        raise CheckpointError("refused: it would import builtins.getattr, which no checkpoint needs")
    return owner(name)


def read_index(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Chunk]]:
    """Return the tensors and the objects of an index by their stored keys; CheckpointError if damaged or unsafe."""
    content = read_small(path, MAX_INDEX)
    try:
        check_pickle(content)
        return _index(IndexUnpickler(content).load())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything, and an intact one can contain anything
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {_short(error)}") from None


def _index(metadata: Any) -> tuple[dict[str, TensorInfo], dict[str, Chunk]]:
    """Return the tensors and the objects of an unpickled index; any exception if it is not one."""
    fields = _fields(metadata)
    places = _places(fields["storage_data"])
    flattened = fields.get("mcore_data") or {}
    entries = _table(fields["state_dict_metadata"])
    tensors: dict[str, TensorInfo] = {}
    objects: dict[str, Chunk] = {}
    left = 2 * len(places) + _FREE_CHUNKS
    for key, item in entries.items():
        if type(key) is not str or len(key) > _MAX_KEY:
            raise TypeError(f"a key is {reprlib.repr(key)}")
        if isinstance(item, _TensorEntry):
            chunks = _sequence(_fields(item)["chunks"])
            left -= len(chunks)
            if left < 0:  # else a few bytes, repeated, would become any number of chunks
                raise ValueError(f"{key}: has chunks that are stored nowhere")
            tensors[key] = unflattened(_tensor_info(places, key, _fields(item), chunks), _original(flattened, key))
        else:
            objects[key] = _chunk((), places[key, None])
    return tensors, objects


def _places(storage: Any) -> dict[tuple[str, tuple[int, ...] | None], Mapping[str, Any]]:
    """Return the place of each piece by its key and its first corner, as the index lists them."""
    found = {}
    for piece, where in _table(storage).items():
        if not isinstance(piece, _PieceIndex):
            raise TypeError(f"a piece is {reprlib.repr(piece)}")
        fields = _fields(piece)
        key, offset = fields["fqn"], fields.get("offset")
        if type(key) is not str:
            raise TypeError(f"a key is {reprlib.repr(key)}")
        found[key, None if offset is None else _numbers(offset)] = _fields(where)
    return found


def _fields(item: Any) -> Mapping[str, Any]:
    """Return the fields of a stand-in."""
    if not isinstance(item, StandIn) or not isinstance(item.attributes, Mapping):
        raise TypeError(f"{reprlib.repr(item)} has no fields")
    return item.attributes


def _table(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{reprlib.repr(value)} is not keys and values")
    return value


def _sequence(value: Any) -> list[Any] | tuple[Any, ...]:
    if type(value) not in (list, tuple):
        raise TypeError(f"{reprlib.repr(value)} is not a list")
    found: list[Any] | tuple[Any, ...] = value
    return found


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _tensor_info(
    places: Mapping[tuple[str, tuple[int, ...] | None], Mapping[str, Any]],
    key: str,
    fields: Mapping[str, Any],
    stored: Iterable[Any],
) -> TensorInfo:
    dtype = _fields(fields["properties"])["dtype"]
    if type(dtype) is not TypeName:
        raise TypeError(f"{key}: its dtype is {reprlib.repr(dtype)}")
    chunks = []
    for chunk in stored:
        starts, lengths = _numbers(_fields(chunk)["offsets"]), _numbers(_fields(chunk)["sizes"])
        box = tuple((start, start + size) for start, size in zip(starts, lengths, strict=True))
        placed = _chunk(box, places[key, starts])
        volume = dtype.dtype.itemsize
        for size in lengths:
            volume *= size
        if volume > placed.length:  # ensures that no more memory is requested than there is on disk
            raise ValueError(f"{key}: a chunk of {lengths} does not fit in {placed.length} bytes")
        chunks.append(placed)
    return TensorInfo(_numbers(fields["size"]), dtype.dtype, tuple(chunks))


def _original(flattened: Any, key: str) -> tuple[int, ...] | None:
    """The original shape of a tensor that Megatron-Core up to 0.15 flattened over data-parallel ranks, else None."""
    entry = _table(flattened).get(key) or {}
    shape = _table(entry).get("nd_reformulated_orig_global_shape")
    return None if shape is None else _numbers(shape)


def _chunk(box: tuple[tuple[int, int], ...], where: Mapping[str, Any]) -> Chunk:
    name = where["relative_path"]
    if type(name) is not str or len(name) > _MAX_KEY:
        raise TypeError(f"a file name is {reprlib.repr(name)}")
    offset, length = _numbers((where["offset"], where["length"]))
    return Chunk(box, name, offset, length, archive=True)


def _numbers(values: Any) -> tuple[int, ...]:
    """Return values as a tuple; TypeError unless all are whole numbers from 0 on, and few, as sizes are."""
    if type(values) not in (tuple, list) or len(values) > _MAX_DIMENSIONS:
        raise TypeError(f"{reprlib.repr(values)} are not sizes")
    for number in values:
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise TypeError(f"{reprlib.repr(values)} are not sizes")
    return tuple(values)
