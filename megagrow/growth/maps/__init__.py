"""Maps of axes, layers, heads and experts: data and arithmetic, no tensors."""

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
    "cyclic_copies",
    "padded",
    "consecutive_runs",
    "shares",
    "unchanged_heads",
]
