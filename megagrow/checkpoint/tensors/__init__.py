"""Megatron's tensors: the table of them, their dimensions, and the record of which entries a growth step added."""

from megagrow.checkpoint.tensors.dimensions import VOCAB_READ, VOCAB_WRITE
from megagrow.checkpoint.tensors.growth_record import (
    GROWTH_RECORD,
    copy_pairs,
    new_entries,
    read_growth_record,
    recorded_step,
    write_growth_record,
)
from megagrow.checkpoint.tensors.inventory import check_tensors, model_tensors
from megagrow.checkpoint.tensors.table import (
    LAYERS,
    OPTIMIZER_STATES,
    TensorKind,
    extra_state_keys,
    optimizer_key,
    source_kind,
    tensor_kinds,
)

__all__ = [
    "GROWTH_RECORD",
    "LAYERS",
    "OPTIMIZER_STATES",
    "TensorKind",
    "VOCAB_READ",
    "VOCAB_WRITE",
    "check_tensors",
    "copy_pairs",
    "dimensions",
    "extra_state_keys",
    "tensor_kinds",
    "model_tensors",
    "new_entries",
    "optimizer_key",
    "read_growth_record",
    "source_kind",
    "recorded_step",
    "write_growth_record",
]
