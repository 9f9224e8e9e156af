"""Megatron's torch_dist format, and the torch.distributed.checkpoint (DCP) format on which it is built."""

from megagrow.checkpoint.formats.torch_dist.dcp import open_dcp
from megagrow.checkpoint.formats.torch_dist.extra_states import carried_states, scaling_states
from megagrow.checkpoint.formats.torch_dist.flat_optimizer import FlatOptimizerReader, read_flat_optimizer
from megagrow.checkpoint.formats.torch_dist.gathered_optimizer import gathered_buffers
from megagrow.checkpoint.formats.torch_dist.index import IndexUnpickler
from megagrow.checkpoint.formats.torch_dist.index_write import ArchiveLocation, ChunkEntry, write_index
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader

__all__ = [
    "IndexUnpickler",
    "ArchiveLocation",
    "ChunkEntry",
    "FlatOptimizerReader",
    "TorchDistReader",
    "carried_states",
    "gathered_buffers",
    "open_dcp",
    "read_flat_optimizer",
    "scaling_states",
    "write_index",
]
