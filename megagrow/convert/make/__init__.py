"""Makes the values of any box of a target tensor."""

from megagrow.convert.make.grown_source import GrownSource
from megagrow.convert.make.maker import import_torch, maker_of
from megagrow.convert.make.rows import PIECE_VALUES, Piece

__all__ = ["GrownSource", "PIECE_VALUES", "Piece", "import_torch", "maker_of"]
