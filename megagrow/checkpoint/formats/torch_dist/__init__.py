"""Megatron's torch_dist format, and the torch.distributed.checkpoint (DCP) format that it builds on."""

from megagrow.checkpoint.formats.torch_dist.dcp import open_dcp
from megagrow.checkpoint.formats.torch_dist.flat_optimizer import Resharded, resharded
from megagrow.checkpoint.formats.torch_dist.gathered_optimizer import gathered_buffers
from megagrow.checkpoint.formats.torch_dist.index_write import Entry, Place, write_index
from megagrow.checkpoint.formats.torch_dist.read import Reader

__all__ = ["Entry", "Place", "Reader", "Resharded", "gathered_buffers", "open_dcp", "resharded", "write_index"]
