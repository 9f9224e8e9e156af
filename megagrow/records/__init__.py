"""Typed records of events: one JSON object per line, appended as each event happens.

Reports, `status` and tests read these files, never a log. Records are frozen, and `kind` names their type.
"""

from megagrow.records.kinds import (
    AnyRecord,
    Compared,
    ConversionRecord,
    CopiesRow,
    DeepRecord,
    EvalRecord,
    GradientRow,
    JobRecord,
    Record,
    ResidualRow,
    RollBackRecord,
    StageRecord,
    StepRecord,
)
from megagrow.records.store import append, read, rewind

__all__ = [
    "AnyRecord",
    "Compared",
    "ConversionRecord",
    "CopiesRow",
    "DeepRecord",
    "EvalRecord",
    "GradientRow",
    "JobRecord",
    "Record",
    "ResidualRow",
    "RollBackRecord",
    "StageRecord",
    "StepRecord",
    "append",
    "read",
    "rewind",
]
