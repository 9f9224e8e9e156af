"""From the text of a family.yaml to a checked `Family`, or one clear error.

`load` reads yaml, applies dotted overrides, merges `defaults` into every stage, validates every field, rejects
unknown keys with the nearest known one, and then checks the rules between sections. No code downstream checks
a setting again: a `Family` is frozen and valid by construction. No torch, no megatron.
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
from megagrow.config.function import check_growth, check_same_model
from megagrow.config.load import load, load_text, to_yaml
from megagrow.config.pipeline import UNEVEN
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
    "check_growth",
    "check_same_model",
    "UNEVEN",
    "load",
    "load_text",
    "to_yaml",
]
