"""Opens the source of a conversion from directory to directory, with what the command line says about its shape."""

from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.config import check_same_model
from megagrow.config.target import given_source, source_shape
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    from megagrow.checkpoint.index import OpenCheckpoint


def open_source(
    path: Path, overrides: list[str], *, optimizer: bool, ignored_arguments: tuple[str, ...] = ()
) -> "OpenCheckpoint":
    """Open a checkpoint, so that its shape is known.

    Args:
        path: of the checkpoint.
        overrides: of the command line; those of `source` complete what the checkpoint does not record.
        optimizer: whether to read Adam's state.
        ignored_arguments: saved arguments that Megatron-LM does not have and the user knows to be harmless.

    Raises:
        CheckpointError: the shape is neither recorded nor shown by the tensors nor given; or what is given is not
            what the checkpoint records.
    """
    from megagrow.checkpoint.formats import open_checkpoint
    from megagrow.checkpoint.tensors import ShapeNotRecordedError, fields_of_unrecorded

    given = given_source(overrides)
    try:
        opened = open_checkpoint(path, optimizer=optimizer, ignored_arguments=ignored_arguments)
        shapes = {key: info.shape for key, info in opened.source.tensors.items()}
    except ShapeNotRecordedError as unknown:
        opened, shapes = None, dict(unknown.shapes)
    if opened is None or opened.shape is None:
        shape = source_shape(fields_of_unrecorded(path, shapes, given))
        return open_checkpoint(path, shape=shape, optimizer=optimizer, ignored_arguments=ignored_arguments)
    try:
        stated = source_shape({**opened.shape.model_dump(), **given})
        check_same_model(opened.shape, stated, ("the checkpoint", "the command (source.*)"))
    except ValueError as error:
        raise CheckpointError(f"{path}: records its shape, and the command contradicts it: {error}") from None
    return opened
