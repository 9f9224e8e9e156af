"""The pickle of a tensor in a torch.save archive, read and written without torch.

Reading: an unpickler that accepts only plain tensors, and returns each as a strided view of a storage, whose values
are a member of the archive. Writing: stubs that pickle like torch's tensors and storages.
"""

import math
import reprlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from megagrow.checkpoint.index import DType, row_major
from megagrow.checkpoint.pickles.dump import dumps
from megagrow.checkpoint.pickles.stand_ins import ClosedUnpickler, Function, TypeName, refuse_change
from megagrow.checkpoint.pickles.zip_format import STORAGES

_MAX_DIMENSIONS = 64
"""Of a tensor; torch's own limit."""


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A storage as its pickle describes it: type, archive member, and number of entries."""

    dtype: DType
    member: str
    numel: int

    __setstate__ = refuse_change


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as its pickle describes it: a view of a storage, counted in entries."""

    storage: PickledStorage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    __setstate__ = refuse_change


class TensorUnpickler(ClosedUnpickler):
    """An unpickler that accepts plain tensors, as `PickledTensor`s, and nothing else."""

    because = ", which no tensor needs"

    def stand_in(self, module: str, name: str) -> Any:
        """Return what replaces one of torch's names; None for any other."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Function(_rebuild_tensor)
        if (module, name) == ("collections", "OrderedDict"):
            return Function(self.table)
        if module == "torch" and name in STORAGES:
            return TypeName(STORAGES[name])
        return None

    def names(self) -> list[tuple[str, str]]:
        """Return the names of a tensor's parts."""
        parts = [("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")]
        return parts + [("torch", name) for name in STORAGES]

    def persistent_load(self, pid: Any) -> PickledStorage:
        """Return a storage, which pickles refer to by the archive member that contains it."""
        kind, dtype, member, _, numel = pid
        if kind != "storage" or type(dtype) is not TypeName or type(member) is not str or type(numel) is not int:
            raise ValueError(f"not a storage: {reprlib.repr(pid)}")
        return PickledStorage(dtype.dtype, member, numel)


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> PickledTensor:
    """Replaces torch's function of the same purpose, both when reading and when writing."""
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MAX_DIMENSIONS:
        raise ValueError("not a plain tensor")
    if type(storage) is not PickledStorage or any(type(n) is not int for n in (start, *shape, *strides)):
        raise ValueError("not a plain tensor")
    return PickledTensor(storage, start, shape, strides)


class _StorageStub:
    """Represents a storage while its tensor is pickled."""

    def __init__(self, member: str, dtype: DType, numel: int) -> None:
        self.member, self.dtype, self.numel = member, dtype, numel


class TensorStub:
    """Pickles as a contiguous tensor whose values are the whole archive member `data/<member>`."""

    def __init__(self, member: str, dtype: DType, shape: tuple[int, ...]) -> None:
        self.member, self.dtype, self.shape = member, dtype, shape

    def __reduce__(self) -> Any:
        storage = _StorageStub(self.member, self.dtype, math.prod(self.shape))
        return _rebuild_tensor, (storage, 0, self.shape, row_major(self.shape), False, OrderedDict())


class _StorageType:
    """Represents one of torch's storage classes; `__getattr__` makes all of them names of this module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce_ex__(self, protocol: Any) -> str:
        return self._name


_TYPES = {dtype: _StorageType(name) for name, dtype in STORAGES.items()}


def __getattr__(name: str) -> _StorageType:
    """Return a storage class by its name, which pickle checks to exist."""
    if name not in STORAGES:
        raise AttributeError(name)
    return _TYPES[STORAGES[name]]


_THEIRS = {
    (__name__, "_rebuild_tensor"): ("torch._utils", "_rebuild_tensor_v2"),
    **{(__name__, name): ("torch", name) for name in STORAGES},
}


def pickle_with_stubs(value: Any) -> bytes:
    """Return the pickle that torch.save would write of a value; NeedsTorchError if it contains a real tensor."""
    return dumps(value, _THEIRS, _storage_id)


def _storage_id(value: Any) -> Any:
    """Return torch's id of a storage; None for everything else."""
    if not isinstance(value, _StorageStub):
        return None
    return ("storage", _TYPES[value.dtype], value.member, "cpu", value.numel)
