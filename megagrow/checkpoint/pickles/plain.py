"""Makes plain values of what an unpickler returned: the only form in which a pickle's content leaves this room.

A pickle can refer to one value many times, so a few kilobytes can describe a value that would be endless as text or as
JSON. Shared values stay shared here, and their size is counted as if they were not.
"""

import reprlib
from collections.abc import Callable
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.stand_ins import StandIn, TypeName
from megagrow.checkpoint.pickles.state_pickle import ARGUMENTS
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor
from megagrow.errors import CheckpointError

_MAX_DEPTH, _MAX_SIZE = 100, 1 << 22
"""Values in values, and values in all; a text counts as one for each 64 characters."""
_SCALARS = (type(None), bool, int, float, DType)
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 1000


def to_plain(value: Any, tensor: Callable[[PickledTensor], Any] = lambda found: found) -> Any:
    """Return a value with arguments as dicts, and enums and other stand-ins as text, at any depth.

    Args:
        value: from an unpickler.
        tensor: makes of a tensor what the result contains.

    Raises:
        CheckpointError: it is too deep or too large, contains itself, or contains what is no value.
    """
    return _Plain(tensor).make(value, 0)[0]


class _Plain:
    """One value on its way to a plain one: what was made already, by identity, with its size."""

    def __init__(self, tensor: Callable[[PickledTensor], Any]) -> None:
        self._tensor = tensor
        self._done: dict[int, tuple[Any, int]] = {}

    def make(self, value: Any, depth: int) -> tuple[Any, int]:
        """Return the plain value, and its size."""
        if type(value) in _SCALARS:
            return value, 1
        if type(value) in (str, bytes):
            return value, 1 + len(value) // 64
        if id(value) in self._done:
            return self._done[id(value)]
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"refused: values in values, more than {_MAX_DEPTH} deep")
        made, size = (
            self._container(value, depth) if isinstance(value, dict | list | tuple | set) else self._other(value, depth)
        )
        if size > _MAX_SIZE:
            raise CheckpointError(f"refused: it repeats values until there are more than {_MAX_SIZE:,}")
        self._done[id(value)] = made, size
        return made, size

    def _container(self, value: Any, depth: int) -> tuple[Any, int]:
        if isinstance(value, dict):
            pairs = [(self._key(key, depth + 1), self.make(each, depth + 1)) for key, each in value.items()]
            return {key: each for (key, _), (each, _) in pairs}, 1 + sum(a + b for (_, a), (_, b) in pairs)
        if type(value) is set:
            members = [self._key(each, depth + 1) for each in value]
            return {each for each, _ in members}, 1 + sum(size for _, size in members)
        items = [self.make(each, depth + 1) for each in value]
        return type(value)(each for each, _ in items), 1 + sum(size for _, size in items)

    def _key(self, value: Any, depth: int) -> tuple[Any, int]:
        """Return the plain form of a key, which a dict must be able to hash."""
        made, size = self.make(value, depth)
        try:
            hash(made)
        except TypeError:
            raise CheckpointError(f"damaged: {type(made).__name__} as a key") from None
        return made, size

    def _other(self, value: Any, depth: int) -> tuple[Any, int]:
        if isinstance(value, TypeName):
            return value.dtype, 1
        if isinstance(value, PickledTensor):
            return self._tensor(value), 1
        if isinstance(value, StandIn) and value.name in ARGUMENTS:
            return self._container(dict(value.attributes), depth)
        if isinstance(value, StandIn):
            text = f"{value.name}({', '.join(map(_shown, value.arguments))})"
            return text, 1 + len(text) // 64
        if isinstance(value, type) and issubclass(value, StandIn):
            return value.name, 1
        raise CheckpointError(f"refused: it contains {type(value).__name__}, which is no value")


def _shown(argument: Any) -> str:
    return _SHOWN.repr(argument) if type(argument) in (str, int, float, bool) else "..."
