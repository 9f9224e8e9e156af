"""What Megatron's formats have in common: arguments, module names, flat optimizer buffers, unsharded state."""

from megagrow.checkpoint.formats.megatron_common.argument_check import (
    argument_notes,
    check_arguments,
    classify_argument,
)
from megagrow.checkpoint.formats.megatron_common.arguments import (
    arguments_of,
    carried_arguments,
    layout_of_arguments,
    shape_of_arguments,
)
from megagrow.checkpoint.formats.megatron_common.buffers import (
    BufferRange,
    boxes_of_range,
    bucket_layout,
    possible_bucket_sizes,
    unflattened,
)
from megagrow.checkpoint.formats.megatron_common.family import family_of_arguments
from megagrow.checkpoint.formats.megatron_common.module_names import (
    EXPERTS,
    ModuleName,
    canonical_name,
    is_older_dialect,
    module_name,
)
from megagrow.checkpoint.formats.megatron_common.resumable_state import (
    at_schedule_start,
    resumable,
    schedule_state,
    without_rates,
)
from megagrow.checkpoint.formats.megatron_common.run_config import RUN_CONFIG, run_config_arguments
from megagrow.checkpoint.formats.megatron_common.script import arguments_of_script
from megagrow.checkpoint.formats.megatron_common.unsharded_state import (
    canonical_common,
    common_of_layout,
    grown_common,
    optimizer_refusal,
)

__all__ = [
    "at_schedule_start",
    "EXPERTS",
    "RUN_CONFIG",
    "BufferRange",
    "ModuleName",
    "argument_notes",
    "arguments_of",
    "arguments_of_script",
    "boxes_of_range",
    "bucket_layout",
    "canonical_common",
    "canonical_name",
    "carried_arguments",
    "check_arguments",
    "classify_argument",
    "common_of_layout",
    "family_of_arguments",
    "grown_common",
    "is_older_dialect",
    "layout_of_arguments",
    "module_name",
    "optimizer_refusal",
    "possible_bucket_sizes",
    "resumable",
    "run_config_arguments",
    "schedule_state",
    "shape_of_arguments",
    "unflattened",
    "without_rates",
]
