"""One growth step: the maps of all axes between two shapes, and what they promise."""

from dataclasses import dataclass
from enum import Enum

from megagrow.config import ModelShape
from megagrow.growth.maps.axis import AxisMap
from megagrow.growth.maps.expert import ExpertMap
from megagrow.growth.maps.head import HeadMap
from megagrow.growth.maps.layer import LayerMap


class Moments(Enum):
    """What becomes of Adam's moments; masters and weights grow as values."""

    EXACT = "exact"
    """By duality, for every entry with a source."""
    COPY = "copy"
    """Gathered, unscaled."""
    ASYMMETRIC = "asymmetric"
    """Exact for old entries, zero for new ones: copies come apart."""
    RESET = "reset"
    """Zero, and the step count too."""


@dataclass(frozen=True, eq=False)
class GrowthStep:
    """The maps of one growth step.

    Attributes:
        small, large: the two shapes.
        hidden, ffn, heads, layers, vocab: the maps of the axes; `ffn` is the width of an expert where there are some.
        experts: their map; None in a dense model.
        shared: map of the shared expert's width; None where the source has none.
        moments: the moment policy.
        noise: relative noise on new copies.
        shrink: factor on all old weights, a fresh initialization being added to them (szp); None: not so.
        seed: of all random parts.
        exact: whether the grown model computes the same function.
        operators: operator used on each axis that grows.
        masked: axes whose operator works by a mask: their new coordinates are raised in training.
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
