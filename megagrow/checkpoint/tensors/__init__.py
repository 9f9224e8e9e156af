"""Megatron's tensors: the table of them, their dimensions, and the record of which entries a growth step added."""

from megagrow.checkpoint.tensors.dimensions import VOCAB_READ, VOCAB_WRITE
from megagrow.checkpoint.tensors.growth_record import (
    GROWTH_RECORD,
    NEW_PARAMETERS,
    copy_pairs,
    new_entries,
    read_growth_record,
    recorded_step,
    spans_of,
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
from megagrow.checkpoint.tensors.unknown_settings import is_empty, note_on_unknown, refuse_suspects, short_text
from megagrow.checkpoint.tensors.unrecorded import ShapeNotRecordedError, Shapes, fields_of_unrecorded

__all__ = [
    "GROWTH_RECORD",
    "LAYERS",
    "NEW_PARAMETERS",
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
    "is_empty",
    "model_tensors",
    "new_entries",
    "note_on_unknown",
    "optimizer_key",
    "read_growth_record",
    "recorded_step",
    "refuse_suspects",
    "short_text",
    "source_kind",
    "spans_of",
    "tensor_kinds",
    "write_growth_record",
]
