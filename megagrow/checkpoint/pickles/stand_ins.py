"""What a pickle gets instead of the classes and functions that it names, and the unpickler that hands it out.

A pickle can call what it names, and it can set attributes of every object that it holds (the opcode BUILD), be it an
instance, a class or a function. So it holds nothing that anyone else uses: no class of Python's, torch's or ours, no
function, no member of an enum. Each name becomes a stand-in that is made for one reading, and a stand-in refuses every
change except the state of an instance that the pickle itself made.

Calls are bounded too. A pickle refers to a value that it has made in two bytes, so whatever copies a value is charged
for it (`ClosedUnpickler.copied`), else a few kilobytes would become gigabytes.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from megagrow.checkpoint.index import DType
from megagrow.errors import CheckpointError

_MAX_ARGUMENTS = 64
_NO_ATTRIBUTES: Mapping[str, Any] = MappingProxyType({})
_PYTHON_2 = {"__builtin__": "builtins"}
"""Modules by their name in pickles of protocol 2, where it differs."""


def refuse_change(*_: Any) -> NoReturn:
    """Raise CheckpointError: a pickle tries to change something that it has not made."""
    raise CheckpointError("refused: it would change a class, a function or a type, which no checkpoint needs")


class Sealed(type):
    """The class of all stand-ins' classes: once made, nothing in them can be set or deleted."""

    __setattr__ = refuse_change
    __delattr__ = refuse_change

    @property
    def __setstate__(cls) -> Any:  # a property, so that it precedes the method that the class has for its instances
        refuse_change()


class StandIn(metaclass=Sealed):
    """An object whose class is not imported. `stand_in_class` makes a class of these for each name of a reading.

    Attributes:
        name: dotted name of the class.
        arguments, attributes: the constructor's arguments and the state, from the pickle.
    """

    __slots__ = ("arguments", "attributes")

    name = ""
    arguments: tuple[Any, ...]
    attributes: Mapping[str, Any]

    def __new__(cls, *arguments: Any) -> "StandIn":
        """Accept any arguments, and keep them."""
        if len(arguments) > _MAX_ARGUMENTS:
            raise CheckpointError(f"refused: {cls.name} has {len(arguments)} arguments")
        made = super().__new__(cls)
        made.arguments, made.attributes = arguments, _NO_ATTRIBUTES
        return made

    def __init__(self, *arguments: Any) -> None:
        """Do nothing: `__new__` has kept the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep a state that is a dict; refuse one that would set slots."""
        if type(state) is not dict:
            raise CheckpointError(f"refused: the state of {self.name} is {type(state).__name__}, not keys and values")
        self.attributes = state


class Fixed(StandIn):
    """An object that never has a state: a member of an enum, a path, a memory layout."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Refuse."""
        refuse_change()


class Opaque(StandIn):
    """An object whose state may be anything, because nobody reads it: numpy's arrays and types."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop it."""


def stand_in_class(name: str, kind: type[StandIn] = StandIn) -> type[StandIn]:
    """Return a new class, of stand-ins of that kind, to replace the class of that dotted name."""
    made: Any = Sealed(kind.__name__, (kind,), {"name": name, "__slots__": ()})
    found: type[StandIn] = made
    return found


class Function(metaclass=Sealed):
    """Replaces a function: calls one of ours."""

    __slots__ = ("_ours",)

    def __init__(self, ours: Callable[..., Any]) -> None:
        self._ours = ours

    def __call__(self, *arguments: Any) -> Any:
        """Call ours."""
        return self._ours(*arguments)

    __setstate__ = refuse_change


class TypeName(metaclass=Sealed):
    """Replaces one of torch's types."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype

    def __str__(self) -> str:
        return str(self.dtype)

    __repr__ = __str__
    __setstate__ = refuse_change


class Table(dict[Any, Any], metaclass=Sealed):
    """Replaces an OrderedDict or a defaultdict. Attributes, as torch gives to a module's state, are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes."""


class ClosedUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing; subclasses say what replaces a name.

    Attributes:
        because: why another name is refused, for its error.
    """

    because = ""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._made: dict[tuple[str, str], Any] = {}
        self._left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """Return what replaces a name in this reading, always the same; CheckpointError for any other name."""
        key = (_PYTHON_2.get(module, module), name)
        if key not in self._made:
            made = self.stand_in(*key)
            if made is None:
                dotted = " ".join(".".join(key).split())
                raise CheckpointError(f"refused: it would import {dotted[:200]}{self.because}")
            self._made[key] = made
        return self._made[key]

    def stand_in(self, module: str, name: str) -> Any:
        """Return a new stand-in for a name; None if the name is not allowed."""
        return None

    def names(self) -> list[tuple[str, str]]:
        """Return modules and names that are allowed: all, or where a pattern allows more, an example of it."""
        return []

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: only tensors refer to something outside their pickle."""
        raise CheckpointError("refused: it refers to a storage, which only a tensor does")

    def copied(self, values: Any, *types: type) -> Any:
        """Return a value that is about to be copied; an error if all copies together are larger than the pickle.

        Args:
            values: to be copied.
            types: that it may have.
        """
        if type(values) not in types:
            raise TypeError(f"{type(values).__name__} is not {' or '.join(each.__name__ for each in types)}")
        self._left -= len(values)
        if self._left < 0:
            raise CheckpointError("refused: it copies its values over and over")
        return values

    def table(self, *arguments: Any) -> Table:
        """Replaces `OrderedDict()`, which old pickles give a list of pairs."""
        return Table(*(self.copied(each, list, tuple) for each in arguments[:1]))

    def defaults(self, *arguments: Any) -> Table:
        """Replaces `defaultdict(factory)`, whose items follow."""
        return Table()

    def members(self, *arguments: Any) -> set[Any]:
        """Replaces `set(list)`."""
        return set(*(self.copied(each, list, tuple) for each in arguments[:1]))

    def size(self, *arguments: Any) -> tuple[Any, ...]:
        """Replaces `torch.Size(tuple)`."""
        (values,) = arguments or ((),)
        return values if type(values) is tuple else tuple(self.copied(values, list))

    def latin1(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Replaces `_codecs.encode`, by which protocol 2 pickles bytes."""
        encoded: bytes = self.copied(text, str).encode("latin1")
        return encoded
