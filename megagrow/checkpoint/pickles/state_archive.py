"""A torch.save archive of many tensors, laid out to the byte before any value exists.

`torch.save` keeps everything in memory until it is written. Here the state is pickled with stubs instead of tensors,
and each stub's values become a member of the archive of known size and position. So the size of the file is known at
once, and values are requested one tensor after another.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.tensor_pickle import TensorStub, pickle_with_stubs
from megagrow.checkpoint.pickles.zip_writer import ZipWriter
from megagrow.errors import CheckpointError


class StateArchive:
    """The archive of a state that contains stubs instead of tensors.

    Attributes:
        size: bytes of the whole file.
    """

    def __init__(self, state: Any, stubs: Sequence[TensorStub]) -> None:
        """Lay out an archive.

        Args:
            state: plain values and stubs.
            stubs: the stubs in it, in the order in which their values will be written.
        """
        layout = ZipWriter()
        self._stubs = tuple(stubs)
        self._start = layout.start(pickle_with_stubs(state))
        self._headers = tuple(layout.header(f"data/{stub.member}", _byte_size(stub)) for stub in stubs)
        self._end = layout.end()
        self.size = layout.at + len(self._end)

    def pieces(self) -> Iterator[bytes | TensorStub]:
        """Yield the file's content in order: bytes, and stubs, each to be replaced by its values, row by row."""
        yield self._start
        for header, stub in zip(self._headers, self._stubs, strict=True):
            yield header
            yield stub
        yield self._end


def tensor_stub(number: int, dtype: DType, shape: tuple[int, ...]) -> TensorStub:
    """Return the stub of tensor `number` of an archive; CheckpointError if models have no weights of that type."""
    if dtype not in (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16, DType.FLOAT64):
        raise CheckpointError(f"{dtype} is not a type of model weights")
    return TensorStub(str(number), dtype, shape)


def _byte_size(stub: TensorStub) -> int:
    return math.prod(stub.shape) * stub.dtype.itemsize
