"""Maps of axes, heads, layers and experts, and the `GrowthStep` that holds them: data and arithmetic, no torch."""

from megagrow.growth.maps.axis import (
    NO_SOURCE,
    AxisMap,
    DimMap,
    Fill,
    Flags,
    Indices,
    Role,
    Scales,
    consecutive_runs,
    cyclic_copies,
    multiplicity,
    padded,
    shares,
)
from megagrow.growth.maps.exactness import Exactness
from megagrow.growth.maps.expert import ExpertMap
from megagrow.growth.maps.head import HeadMap, unchanged_heads
from megagrow.growth.maps.layer import Inside, LayerMap, Silence
from megagrow.growth.maps.step import GrowthStep, Moments

__all__ = [
    "AxisMap",
    "DimMap",
    "Exactness",
    "ExpertMap",
    "Fill",
    "Flags",
    "GrowthStep",
    "HeadMap",
    "Indices",
    "Inside",
    "LayerMap",
    "Moments",
    "NO_SOURCE",
    "Role",
    "Scales",
    "Silence",
    "consecutive_runs",
    "cyclic_copies",
    "multiplicity",
    "padded",
    "shares",
    "unchanged_heads",
]
