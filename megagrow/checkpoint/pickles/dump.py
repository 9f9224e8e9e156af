"""Pickles that name torch's objects, made without importing torch, which takes seconds.

What stands for an object of torch's is pickled as what it is: a name of one of our modules. In pickle's protocol 2 a
name is written once, as two plain lines, its module and itself; these are exchanged. Tests read the results by torch.
"""

import io
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

from megagrow.checkpoint.index import DType

PickledName = tuple[str, str]
"""Module, and name in it."""
_DTYPES: Mapping[PickledName, PickledName] = {
    (DType.__module__, dtype.value): ("torch", dtype.value) for dtype in DType
}


class NeedsTorchError(Exception):
    """There is a tensor in what is to be pickled."""


def dumps(
    value: Any, theirs: Mapping[PickledName, PickledName], persistent_id: Callable[[Any], Any] = lambda value: None
) -> bytes:
    """Return the pickle of a value.

    Args:
        value: plain values, types of values (`DType`), and stand-ins.
        theirs: name of torch's that each stand-in's is exchanged for.
        persistent_id: of a storage, as torch names it; None for all else.

    Raises:
        NeedsTorchError: a tensor is in it.
        ValueError: a text in it looks like a pickled name.
    """
    stream = io.BytesIO()
    _Pickler(stream, persistent_id).dump(value)
    content = stream.getvalue()
    for (module, ours), (their_module, their) in {**_DTYPES, **theirs}.items():
        here, there = f"c{module}\n{ours}\n".encode(), f"c{their_module}\n{their}\n".encode()
        if content.count(here) > 1:  # a name is written once: the other is a text that would be changed as well
            raise ValueError(f"a text looks like a pickled name: {here!r}")
        content = content.replace(here, there)
    return content


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, persistent_id: Callable[[Any], Any]) -> None:
        super().__init__(stream, protocol=2)
        self._id = persistent_id
        torch = sys.modules.get("torch")
        self._tensors: tuple[type, ...] = (torch.Tensor, torch.UntypedStorage) if torch else ()

    def persistent_id(self, value: Any) -> Any:
        """What a value is known by; None: it is pickled itself."""
        if isinstance(value, self._tensors):
            raise NeedsTorchError
        return self._id(value)
