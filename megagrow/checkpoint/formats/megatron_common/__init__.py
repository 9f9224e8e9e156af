"""What Megatron's formats share: arguments, module names, optimizer buffers, unsharded state."""

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
    bucket_sizes,
    unflattened,
)
from megagrow.checkpoint.formats.megatron_common.module_names import (
    EXPERTS,
    ModuleName,
    canonical_name,
    is_old,
    module_name,
)
from megagrow.checkpoint.formats.megatron_common.refusals import WITHOUT
from megagrow.checkpoint.formats.megatron_common.state_pickle import StateUnpickler
from megagrow.checkpoint.formats.megatron_common.unsharded_state import canonical_common, grown_common, unlisted

__all__ = [
    "EXPERTS",
    "ModuleName",
    "BufferRange",
    "StateUnpickler",
    "WITHOUT",
    "arguments_of",
    "boxes_of_range",
    "bucket_layout",
    "bucket_sizes",
    "canonical_name",
    "canonical_common",
    "carried_arguments",
    "grown_common",
    "is_old",
    "layout_of_arguments",
    "module_name",
    "shape_of_arguments",
    "unflattened",
    "unlisted",
]
