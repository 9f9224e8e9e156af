"""The registry of operators: for each name and axis the promise, the paper, and the function that makes the map.

Registering a function is all that an operator needs: the converter and the trainer refer to none by name.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megagrow.errors import GrowthError
from megagrow.growth.maps import Exactness


@dataclass(frozen=True)
class Operator:
    """A registered operator.

    Attributes:
        name: its name in family.yaml.
        axis: hidden, ffn, head, layer, vocab or expert.
        exactness: when it preserves the function.
        paper: its source.
        make: makes the map of an axis from a `Resize`; raises GrowthError if it cannot.
    """

    name: str
    axis: str
    exactness: Exactness
    paper: str
    make: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First line of the docstring of `make`."""
        return (self.make.__doc__ or "").strip().splitlines()[0]


_OPERATORS: dict[tuple[str, str], Operator] = {}


def operator(name: str, *axes: str, exact: Exactness, paper: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as operator `name` on `axes`."""

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        for axis in axes:
            assert (axis, name) not in _OPERATORS, f"operator {name} on {axis} is registered twice"
            _OPERATORS[axis, name] = Operator(name=name, axis=axis, exactness=exact, paper=paper, make=make)
        return make

    return register


def find(axis: str, name: str) -> Operator:
    """Return an operator; GrowthError with the nearest name if it is not registered."""
    found = _OPERATORS.get((axis, name))
    if found is None:
        known = [registered for on, registered in _OPERATORS if on == axis]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise GrowthError(f"growth.{axis}: no operator {name!r}; {hint}known here: {', '.join(known)}")
    return found


def operators() -> tuple[Operator, ...]:
    """All registered operators, one per name and axis."""
    return tuple(_OPERATORS.values())
