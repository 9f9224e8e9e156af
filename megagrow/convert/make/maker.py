"""Chooses between the two makers of values: one only copies, the other computes with torch."""

import importlib
from collections.abc import Iterator
from typing import Protocol

from megagrow.checkpoint.index import Box, Source
from megagrow.convert.make.copier import Copier
from megagrow.convert.make.rows import PIECE_VALUES, Piece
from megagrow.convert.plan import ConversionPlan, Task


class Maker(Protocol):
    """Makes the pieces of a conversion's tasks."""

    def pieces(self, task: Task, box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, state by state, each in row-major order."""


def import_torch() -> None:
    """Import the modules that compute values, and torch with them.

    Call this as early as possible, and before memory is measured, since torch takes a good part of it.
    """
    importlib.import_module("megagrow.convert.make.grower")


def maker_of(conversion: ConversionPlan, source: Source, piece_values: int = PIECE_VALUES) -> Maker:
    """Return the maker of a conversion's pieces; torch is imported only if the conversion needs it."""
    if not conversion.needs_torch:
        return Copier(conversion, source, piece_values)
    from megagrow.convert.make.grower import Grower

    return Grower(conversion, source, piece_values)
