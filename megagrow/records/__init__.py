"""Typed records: what happened, one JSON object a line, written as it happens.

Reports, `status` and tests read these files and never a log. A record is frozen and knows its `kind`.
"""

from megagrow.records.kinds import (
    AnyRecord,
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
