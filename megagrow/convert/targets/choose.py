"""Plans the target of an order, whatever its format."""

from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.checkpoint.tensors import model_tensors
from megagrow.convert.make import GrownSource, import_torch
from megagrow.convert.plan import DTYPE_OF_PRECISION, Order
from megagrow.convert.targets.finite import FiniteCheck
from megagrow.convert.targets.protocol import PlannedTarget
from megagrow.convert.targets.torch_dist import TorchDistTarget


def plan_target(
    order: Order, opened: OpenCheckpoint, piece_values: Callable[[], int], allow_non_finite: bool = False
) -> PlannedTarget:
    """Plan the target of an order.

    Args:
        order: the conversion.
        opened: its source.
        piece_values: returns the number of values in a piece. It is called only when everything that the target needs
            is imported, since imports take memory too.
        allow_non_finite: whether NaN and infinite values are written, and counted.

    Raises:
        CheckpointError: the format cannot express the order, or the source does not hold the tensors of its shape.
    """
    source, dtype = opened.source, DTYPE_OF_PRECISION[order.precision]
    finite = FiniteCheck(str(order.source), allowed=allow_non_finite)
    if order.to == "huggingface":
        from megagrow.checkpoint.formats.huggingface import remembered_of
        from megagrow.convert.targets.huggingface import HuggingFaceTarget

        if order.grows:
            conversion = order.conversion(opened)
            if conversion.needs_torch:
                import_torch()
            source = GrownSource(conversion, source, piece_values())
        elif any(info.dtype != dtype for info in model_tensors(source.tensors).values()):
            import_torch()
        remembered = remembered_of(opened.common)
        return HuggingFaceTarget(
            source,
            order.large,
            dtype,
            remembered=remembered,
            elsewhere="directory" in remembered and not _is_part_of(remembered["directory"], order.source),
            named=_named_tokenizer(opened),
            tokenizer=order.tokenizer,
            piece_bytes=piece_values() * dtype.itemsize,
            finite=finite,
        )
    if order.to == "legacy":
        from megagrow.convert.targets.legacy import LegacyTarget

        import_torch()
        piece_bytes = piece_values() * dtype.itemsize
        return LegacyTarget(source, order.large, order.layout, dtype, opened.common, piece_bytes, finite=finite)
    conversion = order.conversion(opened)
    if conversion.needs_torch:
        import_torch()
    return TorchDistTarget(conversion, source, piece_values(), finite)


def _named_tokenizer(opened: OpenCheckpoint) -> Path | None:
    """The tokenizer that a checkpoint's arguments name."""
    args = opened.common.get("args")
    named = args.get("tokenizer_model") if isinstance(args, dict) else None
    return Path(named) if isinstance(named, str) and named else None


def _is_part_of(named: str, source: Path) -> bool:
    """Whether a directory that a checkpoint names lies in the checkpoint; it may name any."""
    try:
        return Path(named).resolve().is_relative_to(source.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL, or links in a circle
        return False
