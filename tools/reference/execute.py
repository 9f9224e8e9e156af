"""Carry a whole conversion out into a sink, here and now: for tests of the maths."""

from megagrow.checkpoint.index import Source, tensor_of, whole_box
from megagrow.checkpoint.tensors import extra_state_keys
from megagrow.convert.make import PIECE_VALUES, maker_of
from megagrow.convert.plan import ConversionPlan
from tools.reference.sink import Sink


def execute(conversion: ConversionPlan, source: Source, target: Sink, piece_values: int = PIECE_VALUES) -> None:
    """Carry a whole conversion out into a sink, here and now.

    Files are written by `torch_dist_write`, which asks for the same pieces.
    """
    maker, large = maker_of(conversion, source, piece_values), conversion.step.large
    for task in conversion.tasks:
        for piece in maker.pieces(task, whole_box(task.kind.layer_shape(large))):
            target.put(piece.key, task.kind.global_shape(large), piece.corner, tensor_of(piece.values, piece.dtype))
    for key in extra_state_keys(large):
        target.put_object(key, [None])
