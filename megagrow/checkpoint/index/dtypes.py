"""Dtypes by name: all that an index, a plan and a copy need, without torch, whose import is slow."""

from collections.abc import Collection
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Raw = NDArray[Any]
"""Values as raw bit patterns: integers of the same size."""


class DType(Enum):
    """A dtype, under torch's name."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    def __str__(self) -> str:
        return self.value

    def __reduce_ex__(self, protocol: Any) -> str:  # type: ignore[override]  # typeshed does not allow for names
        """Pickle a member as a name of this module, which `pickles.dump` replaces by torch's."""
        return self.value

    @classmethod
    def of(cls, dtype: "torch.dtype") -> "DType":
        """Return the member for a torch dtype; ValueError for one that no checkpoint of Megatron's contains."""
        return cls(str(dtype).removeprefix("torch."))

    @property
    def itemsize(self) -> int:
        """Size of a value in bytes."""
        return _BYTES[self]

    @property
    def is_floating_point(self) -> bool:
        """Whether it is a floating-point type."""
        return "float" in self.value

    @property
    def torch(self) -> "torch.dtype":
        """Torch's own dtype; imports torch."""
        import torch

        found = getattr(torch, self.value)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def raw(self) -> np.dtype[Any]:
        """The integer type of its size."""
        return _RAW[self.itemsize]


_BYTES = {
    DType.FLOAT64: 8, DType.FLOAT32: 4, DType.FLOAT16: 2, DType.BFLOAT16: 2, DType.INT64: 8, DType.INT32: 4,
    DType.INT16: 2, DType.INT8: 1, DType.UINT8: 1, DType.BOOL: 1,
}  # fmt: skip
_RAW = {size: np.dtype(f"i{size}") for size in (1, 2, 4, 8)}


def __getattr__(name: str) -> DType:
    """Return a member by its name, for unpickling."""
    try:
        return DType(name)
    except ValueError:
        raise AttributeError(name) from None


def common_dtype(dtypes: Collection[DType]) -> DType | None:
    """Return the type that holds the values of all these types exactly; None if there is none."""
    if len(set(dtypes)) == 1:
        return next(iter(dtypes))
    if not all(each.is_floating_point for each in dtypes):
        return None
    return DType.FLOAT64 if DType.FLOAT64 in dtypes else DType.FLOAT32


def widened(values: Raw, dtype: DType, wider: DType) -> Raw:
    """Return raw floating-point values in a wider type (see `common_dtype`), exactly, without torch."""
    if dtype is wider:
        return values
    if dtype is DType.BFLOAT16:  # the upper half of a float32
        values, dtype = np.left_shift(values.astype(np.int32), 16), DType.FLOAT32
    return values.view(str(dtype)).astype(str(wider)).view(wider.raw)


def tensor_of(values: Raw, dtype: DType) -> "Tensor":
    """Return raw values as a tensor, in the same memory."""
    import torch

    return torch.from_numpy(values).view(dtype.torch)


def raw_of(values: "Tensor") -> Raw:
    """Return a tensor's raw values, in the same memory if it is contiguous."""
    raw = _RAW[values.element_size()]
    return values.detach().contiguous().view(DType(raw.name).torch).numpy()


def bytes_of(values: Raw) -> memoryview:
    """Return the memory of contiguous values."""
    return memoryview(values.reshape(-1).view(np.uint8).data)
