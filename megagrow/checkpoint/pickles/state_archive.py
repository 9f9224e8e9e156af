"""A torch.save archive of many tensors, planned to the byte before the first value is there.

`torch.save` holds all that it writes. Here the state is pickled with stubs in the place of tensors, and each stub's
values become a member of the archive of known size and place; so the file's size is known at once, and its values are
asked for one tensor after the other.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.tensor_pickle import TensorStub, pickled
from megagrow.checkpoint.pickles.zip_writer import Zip
from megagrow.errors import CheckpointError


class StateArchive:
    """The archive of a state in which tensors are stubs.

    Attributes:
        size: bytes of the whole file.
    """

    def __init__(self, state: Any, stubs: Sequence[TensorStub]) -> None:
        """Args: the state, of plain values and stubs; its stubs, in the order in which values will come."""
        frame = Zip()
        self._stubs = tuple(stubs)
        self._start = frame.start(pickled(state))
        self._headers = tuple(frame.header(f"data/{stub.member}", _bytes(stub)) for stub in stubs)
        self._end = frame.end()
        self.size = frame.at + len(self._end)

    def pieces(self) -> Iterator[bytes | TensorStub]:
        """Yield what the file is made of: bytes, and stubs where their values go, row by row."""
        yield self._start
        for header, stub in zip(self._headers, self._stubs, strict=True):
            yield header
            yield stub
        yield self._end


def stub(number: int, dtype: DType, shape: tuple[int, ...]) -> TensorStub:
    """The stub of an archive's tensor number `number`; CheckpointError where torch.save has no such type."""
    if dtype not in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT64):
        raise CheckpointError(f"{dtype} is no type for a model's weights")
    return TensorStub(str(number), dtype, shape)


def _bytes(of: TensorStub) -> int:
    return math.prod(of.shape) * of.dtype.itemsize
