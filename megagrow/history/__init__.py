"""What a stage is: what made its weights, the tokens and FLOPs spent on it, what it was loaded from, and its state.

There is one such record for a stage, its `StageHistory`. It is written when the stage begins (history.json beside its
records) and carried by each of its checkpoints (`history` in megagrow.json). The checkpoint that the tracker names
decides. `refuse_edits` compares a family.yaml with the histories of its stages; `run`, `train`, `convert`, `launch`,
`status` and `report` all call it, so none of them describes old weights by new settings. No torch.
"""

from megagrow.history.lock import is_held
from megagrow.history.record import Change, Origin, StageHistory, history_of_manifest
from megagrow.history.rule import current_settings, differences, refuse_difference, refuse_edits
from megagrow.history.store import has_only_discarded_steps, read_history, write_history

__all__ = [
    "Change",
    "Origin",
    "StageHistory",
    "current_settings",
    "differences",
    "has_only_discarded_steps",
    "history_of_manifest",
    "is_held",
    "read_history",
    "refuse_difference",
    "refuse_edits",
    "write_history",
]
