"""Writes pickles that refer to torch's objects, without importing torch, which takes seconds.

An object of torch's is represented by one of ours, which is pickled by name. Pickle's protocol 2 writes a name once,
as two plain lines (module and name), and these lines are replaced by torch's. Tests read the results with torch.
"""

import io
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

from megagrow.checkpoint.index import DType

PickledName = tuple[str, str]
"""A module, and a name in it."""
_DTYPES: Mapping[PickledName, PickledName] = {
    (DType.__module__, dtype.value): ("torch", dtype.value) for dtype in DType
}


class NeedsTorchError(Exception):
    """The value to pickle contains a tensor."""


def dumps(
    value: Any, theirs: Mapping[PickledName, PickledName], persistent_id: Callable[[Any], Any] = lambda value: None
) -> bytes:
    """Return the pickle of a value.

    Args:
        value: plain values, `DType` members, and objects that represent torch's.
        theirs: our pickled names, and torch's name that replaces each.
        persistent_id: returns torch's id of a storage, and None for everything else.

    Raises:
        NeedsTorchError: the value contains a tensor.
        ValueError: a string in it looks like a pickled name.
    """
    stream = io.BytesIO()
    _Pickler(stream, persistent_id).dump(value)
    content = stream.getvalue()
    for (module, ours), (their_module, their) in {**_DTYPES, **theirs}.items():
        here, there = f"c{module}\n{ours}\n".encode(), f"c{their_module}\n{their}\n".encode()
        if content.count(here) > 1:  # a name is written once: the other is a string, which would be changed too
            raise ValueError(f"a string looks like a pickled name: {here!r}")
        content = content.replace(here, there)
    return content


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, persistent_id: Callable[[Any], Any]) -> None:
        super().__init__(stream, protocol=2)
        self._id = persistent_id
        torch = sys.modules.get("torch")
        self._tensors: tuple[type, ...] = (torch.Tensor, torch.UntypedStorage) if torch else ()

    def persistent_id(self, value: Any) -> Any:
        """Id under which a value is pickled; None: it is pickled itself."""
        if isinstance(value, self._tensors):
            raise NeedsTorchError
        return self._id(value)
