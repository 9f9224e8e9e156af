"""Megatron's tensors: their table, the dimensions they have, and the record of which entries a growth made."""

from megagrow.checkpoint.tensors.dimensions import VOCAB_READ, VOCAB_WRITE
from megagrow.checkpoint.tensors.growth_record import (
    FILE,
    copy_pairs,
    new_entries,
    read_novelty,
    step_of,
    write_novelty,
)
from megagrow.checkpoint.tensors.inventory import check_tensors, model_tensors
from megagrow.checkpoint.tensors.table import (
    LAYERS,
    OPTIMIZER_STATES,
    TensorKind,
    extra_state_keys,
    kinds,
    optimizer_key,
    source_kind,
)

__all__ = [
    "FILE",
    "LAYERS",
    "OPTIMIZER_STATES",
    "TensorKind",
    "VOCAB_READ",
    "VOCAB_WRITE",
    "check_tensors",
    "copy_pairs",
    "dimensions",
    "extra_state_keys",
    "kinds",
    "model_tensors",
    "new_entries",
    "optimizer_key",
    "read_novelty",
    "source_kind",
    "step_of",
    "write_novelty",
]
