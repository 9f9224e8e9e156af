"""TODO."""

import math
import pickle
import reprlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from megagrow.checkpoint.index import DType, row_major
from megagrow.checkpoint.pickles.dump import dumps
from megagrow.checkpoint.pickles.zip_format import STORAGES
from megagrow.errors import CheckpointError


@dataclass(frozen=True)
class Storage:
    """What a pickle says of a storage: its type, its member of the archive and its entries."""

    dtype: DType
    member: str
    numel: int


@dataclass(frozen=True)
class View:
    """What a pickle says of a tensor: a view of a storage, in entries."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows plain tensors, as views, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; CheckpointError for all others."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        module = {"__builtin__": "builtins"}.get(module, module)  # as pickles of protocol 2 say
        wanted = " ".join(f"{module}.{name}".split())
        raise CheckpointError(f"refused: it would import {wanted}, which no tensor needs")

    def persistent_load(self, pid: Any) -> Storage:
        """What the pickle says of a storage, which is a member of the archive."""
        kind, dtype, member, _, numel = pid
        if kind != "storage" or not isinstance(dtype, DType) or not isinstance(member, str):
            raise ValueError(f"a storage is {reprlib.repr(pid)}")
        return Storage(dtype, member, int(numel))


def _view(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """What stands for torch's function that rebuilds a tensor."""
    view = View(storage, start, tuple(shape), tuple(strides))
    plain = isinstance(storage, Storage) and all(type(n) is int for n in (start, *view.shape, *view.strides))
    if not plain or len(view.shape) != len(view.strides):
        raise ValueError("not a plain tensor")
    return view


class _StorageStub:
    """Stands for a storage while its tensor is pickled."""

    def __init__(self, member: str, dtype: DType, numel: int) -> None:
        self.member, self.dtype, self.numel = member, dtype, numel


class TensorStub:
    """Pickles as a contiguous tensor would that has a storage, the archive's member `data/<member>`, to itself."""

    def __init__(self, member: str, dtype: DType, shape: tuple[int, ...]) -> None:
        self.member, self.dtype, self.shape = member, dtype, shape

    def __reduce__(self) -> Any:
        storage = _StorageStub(self.member, self.dtype, math.prod(self.shape))
        return _view, (storage, 0, self.shape, row_major(self.shape), False, OrderedDict())


class _StorageType:
    """Stands for one of torch's classes of storages, all of which are names of this module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce_ex__(self, protocol: Any) -> str:
        return self._name


_TYPES = {dtype: _StorageType(name) for name, dtype in STORAGES.items()}


def __getattr__(name: str) -> _StorageType:
    """A class of storages by its name: pickle looks whether it is there."""
    if name not in STORAGES:
        raise AttributeError(name)
    return _TYPES[STORAGES[name]]


_THEIRS = {
    (__name__, "_view"): ("torch._utils", "_rebuild_tensor_v2"),
    **{(__name__, name): ("torch", name) for name in STORAGES},
}


def pickled(value: Any) -> bytes:
    """What torch.save would pickle of a value, tensors being stubs; NeedsTorchError where a real one is in it."""
    return dumps(value, _THEIRS, _storage_id)


def _storage_id(value: Any) -> Any:
    """How torch names a storage."""
    if not isinstance(value, _StorageStub):
        return None
    return ("storage", _TYPES[value.dtype], value.member, "cpu", value.numel)
