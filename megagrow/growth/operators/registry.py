"""The registry of operators: a name, the axes it serves, what it promises, its paper, and the function that makes it.

Registering a function is all that an operator needs: the converter and the trainer never name one.
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
        name: as family.yaml names it.
        axis: hidden, ffn, head or layer.
        exactness: when it preserves the function.
        paper: where it comes from.
        make: from the axis' part of the growth step to its map; raises GrowthError where it cannot.
    """

    name: str
    axis: str
    exactness: Exactness
    paper: str
    make: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First line of its docstring."""
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
    """Return an operator, or raise GrowthError that names the nearest one."""
    found = _OPERATORS.get((axis, name))
    if found is None:
        known = [n for a, n in _OPERATORS if a == axis]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise GrowthError(f"growth.{axis}: no operator {name!r}; {hint}known: {', '.join(known)}")
    return found


def operators() -> tuple[Operator, ...]:
    """All registered operators, by axis."""
    return tuple(_OPERATORS.values())
