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
    all_tensor_kinds,
    extra_state_keys,
    optimizer_key,
    source_kind,
    tensor_kinds,
)
from megagrow.checkpoint.tensors.unrecorded import ShapeNotRecordedError, Shapes, fields_of_unrecorded

__all__ = [
    "GROWTH_RECORD",
    "LAYERS",
    "OPTIMIZER_STATES",
    "ShapeNotRecordedError",
    "Shapes",
    "TensorKind",
    "VOCAB_READ",
    "VOCAB_WRITE",
    "all_tensor_kinds",
    "check_tensors",
    "copy_pairs",
    "dimensions",
    "extra_state_keys",
    "fields_of_unrecorded",
    "tensor_kinds",
    "model_tensors",
    "new_entries",
    "optimizer_key",
    "read_growth_record",
    "source_kind",
    "recorded_step",
    "write_growth_record",
]
