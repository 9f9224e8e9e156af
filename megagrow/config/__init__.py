"""Text to checked values: a family.yaml becomes one frozen `Family`, or one clear error.

`load` reads yaml, lays `defaults` under every stage, applies dotted overrides, validates every field, refuses
keys that it does not know by naming the nearest one, and then checks the rules that hold between sections.
After that nobody else checks a setting: a `Family` is right by construction. No torch, no megatron.
"""

from megagrow.config.family import (
    Checkpointing,
    DataSource,
    Evaluation,
    Family,
    GrowthConfig,
    LearningRateRule,
    Stage,
    Trackers,
)
from megagrow.config.load import load, load_text, to_yaml
from megagrow.config.shape import ModelShape
from megagrow.config.stage import Batch, ParallelLayout, Schedule

__all__ = [
    "Batch",
    "Checkpointing",
    "DataSource",
    "Evaluation",
    "Family",
    "GrowthConfig",
    "LearningRateRule",
    "ModelShape",
    "ParallelLayout",
    "Schedule",
    "Stage",
    "Trackers",
    "load",
    "load_text",
    "to_yaml",
]
