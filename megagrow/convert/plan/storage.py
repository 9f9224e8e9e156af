"""What storing does to the weights of a conversion: nothing where values are only copied, else they are rounded.

An operator's exactness is about real numbers. A scaled weight must still be written as bf16 or fp32, and rounding it
changes the logits a little. So every conversion reports, beside the operator's exactness, what its storage rounds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megagrow.checkpoint.index import DType, TensorInfo
from megagrow.checkpoint.tensors import TensorKind, dimensions
from megagrow.growth.maps import NO_SOURCE, GrowthStep

_SIZES = {DType.FLOAT64: (52, 11), DType.FLOAT32: (23, 8), DType.BFLOAT16: (7, 8), DType.FLOAT16: (10, 5)}
"""Bits of the mantissa and of the exponent."""
_NAMES = {DType.FLOAT64: "fp64", DType.FLOAT32: "fp32", DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}
_BEYOND_EXPONENT = (DType.FLOAT16,)
"""Types whose exponents are so few that a power of two may leave their range."""
Scaling = Literal["copied", "powers", "computed"]
"""What growth does to values: nothing, scale them by powers of two, or anything else that needs rounding."""


@dataclass(frozen=True)
class StoredTensor:
    """What is known of one target tensor before any value is read.

    Attributes:
        own: type of the source's own weights, which its function is computed with.
        read: type of the values that are read: the masters', if the source has Adam's state.
        made: type that the target's weights are written in.
        scale: what growth does to a value.
    """

    own: DType
    read: DType
    made: DType
    scale: Scaling

    @property
    def loss(self) -> str | None:
        """Why its weights are not the source's, scaled as the operator says; None if they are, bit for bit."""
        made, own = (_NAMES.get(dtype, str(dtype)) for dtype in (self.made, self.own))
        if self.scale == "computed" or (self.scale == "powers" and self.made in _BEYOND_EXPONENT):
            return f"stored in {made}, which rounds the grown weights"
        if not _holds(self.made, self.own):
            return f"stored in {made}, which rounds the source's {own} weights"
        if not _holds(self.own, self.made) and not _holds(self.own, self.read):
            return f"stored in {made} from the masters, which the source's {own} weights round"
        return None


@dataclass(frozen=True)
class Storage:
    """What storing does to the weights of a conversion.

    Attributes:
        words: for the user.
        rounded: number of tensors whose values are rounded.
    """

    words: str
    rounded: int


def describe_storage(stored: Iterable[StoredTensor], tensors: int) -> Storage:
    """Return what storing does.

    Args:
        stored: the tensors that are made from the source's.
        tensors: number of tensors of the target, new ones included.
    """
    every = list(stored)
    losses = [loss for tensor in every if (loss := tensor.loss) is not None]
    if losses:
        return Storage(f"{'; '.join(dict.fromkeys(losses))} ({len(losses)} of {tensors} tensors)", len(losses))
    if any(tensor.scale == "powers" for tensor in every):
        return Storage("values are only copied, or scaled by powers of two", 0)
    return Storage("values are only copied", 0)


def describe_cast(tensors: Mapping[str, TensorInfo], dtype: DType) -> Storage:
    """Return what storing these tensors in one type does, as an export stores them."""
    stored = (StoredTensor(info.dtype, info.dtype, dtype, "copied") for info in tensors.values())
    return describe_storage(stored, len(tensors))


def scaling_of(kind: TensorKind, step: GrowthStep) -> Scaling:
    """Return what a growth step does to the source's values in tensors of a kind."""
    if step.noise or step.shrink is not None:
        return "computed"
    if kind.dims[0] is dimensions.ROUTER_ROWS and step.experts is not None and step.experts.noise:
        return "computed"
    maps = [dim.grow(step) for dim in kind.dims]
    if any(each.center for each in maps):
        return "computed"
    scales = [each.scale[each.source != NO_SOURCE] for each in maps]
    if all((scale == 1.0).all() for scale in scales):
        return "copied"
    return "powers" if all((np.abs(np.frexp(scale)[0]) == 0.5).all() for scale in scales) else "computed"


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether one type represents every value of another."""
    one, other = _SIZES.get(wide), _SIZES.get(narrow)
    return wide == narrow or (one is not None and other is not None and one[0] >= other[0] and one[1] >= other[1])
