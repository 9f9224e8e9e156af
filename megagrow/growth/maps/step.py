"""One growth step: the maps of all axes between two shapes, and whether they preserve the function."""

from dataclasses import dataclass
from enum import Enum

from megagrow.config import ModelShape
from megagrow.growth.maps.axis import AxisMap
from megagrow.growth.maps.expert import ExpertMap
from megagrow.growth.maps.head import HeadMap
from megagrow.growth.maps.layer import LayerMap


class Moments(Enum):
    """How Adam's moments grow. (fp32 masters grow like weights.)"""

    EXACT = "exact"
    """By duality, for every entry that has a source."""
    COPY = "copy"
    """Copied from the source without scaling."""
    ASYMMETRIC = "asymmetric"
    """Exact for old entries, zero for new ones, so that copies diverge."""
    RESET = "reset"
    """Zero, and so is the step count."""


@dataclass(frozen=True, eq=False)
class GrowthStep:
    """The maps of one growth step.

    Attributes:
        small, large: the source and target shapes.
        hidden, ffn, heads, layers, vocab: the maps of the axes; in a mixture, `ffn` is the width of an expert.
        experts: the map of experts; None in a dense model.
        shared: the map of the shared expert's width; None if the source has no shared expert.
        moments: how Adam's moments grow.
        noise: relative noise on new copies.
        shrink: factor on all old weights before a fresh initialization is added (szp); None: neither.
        seed: seed of all random parts.
        exact: whether the grown model computes the same function.
        operators: the operator used on each axis that grows.
        masked: axes whose operator needs a mask, which raises new coordinates from zero during training.
    """

    small: ModelShape
    large: ModelShape
    hidden: AxisMap
    ffn: AxisMap
    heads: HeadMap
    layers: LayerMap
    vocab: AxisMap
    moments: Moments
    noise: float
    shrink: float | None
    seed: int
    exact: bool
    operators: dict[str, str]
    masked: frozenset[str] = frozenset()
    experts: ExpertMap | None = None
    shared: AxisMap | None = None
