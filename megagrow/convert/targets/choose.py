"""The target that an order asks for."""

from collections.abc import Callable

from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.checkpoint.tensors import model_tensors
from megagrow.convert.make import import_torch
from megagrow.convert.plan import DTYPE_OF_PRECISION, Order, is_copy
from megagrow.convert.targets.production import PlannedTarget
from megagrow.convert.targets.torch_dist import TorchDistTarget


def plan_target(order: Order, opened: OpenCheckpoint, values: Callable[[], int]) -> PlannedTarget:
    """The production that an order asks for.

    Args:
        order: what is asked for.
        opened: its source.
        values: of a piece; asked once all is imported that the production needs, since that takes memory too.
    """
    source, dtype = opened.source, DTYPE_OF_PRECISION[order.precision]
    if order.to == "huggingface":
        from megagrow.checkpoint.formats.huggingface import remembered_of
        from megagrow.convert.targets.huggingface import HuggingFaceTarget

        if any(info.dtype != dtype for info in model_tensors(source.tensors).values()):
            import_torch()
        return HuggingFaceTarget(
            source,
            order.large,
            dtype,
            remembered=remembered_of(opened.common),
            tokenizer=order.tokenizer,
            piece_bytes=values() * dtype.itemsize,
        )
    if order.to == "legacy":
        from megagrow.convert.targets.legacy import LegacyTarget

        import_torch()
        return LegacyTarget(source, order.large, order.layout, dtype, opened.common, values() * dtype.itemsize)
    conversion = order.conversion(source)
    if not is_copy(conversion, source):
        import_torch()
    return TorchDistTarget(conversion, source, values())
