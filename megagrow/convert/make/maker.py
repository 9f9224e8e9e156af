"""Which of the two makers a conversion needs: one that copies, or one that computes with torch."""

import importlib
from collections.abc import Iterator
from typing import Protocol

from megagrow.checkpoint.index import Box, Source
from megagrow.convert.make.copier import Copier
from megagrow.convert.make.rows import PIECE_VALUES, Piece
from megagrow.convert.plan import ConversionPlan, Task, is_copy


class Maker(Protocol):
    """Makes pieces of a conversion's tasks."""

    def pieces(self, task: Task, box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, state by state, each in row-major order."""


def import_torch() -> None:
    """Import what computes values, and torch with it: early, and before memory is measured, for it takes some."""
    importlib.import_module("megagrow.convert.make.grower")


def maker_of(conversion: ConversionPlan, source: Source, piece_values: int = PIECE_VALUES) -> Maker:
    """What makes a conversion's pieces: where it only copies without torch, whose import takes seconds."""
    if is_copy(conversion, source):
        return Copier(conversion, source, piece_values)
    from megagrow.convert.make.grower import Grower

    return Grower(conversion, source, piece_values)
