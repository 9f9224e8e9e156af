"""Fixes how Megatron-Core gathers a distributed optimizer to save it, where it needs that.

The optimizer's buffers are cut into buckets, each padded at its end. Version 0.16.1 (and 0.19, whose source names the
symptom "issue #504") gathers the buckets without their padding, and then cuts parameters out of the result by their
offsets with padding. So with more than one bucket, which tied embeddings under pipeline parallelism produce, every
parameter after the first padding is saved shifted, under another parameter's name, without any error. Loading goes by
parameter and is correct. Here the gathered buckets are moved to the offsets that Megatron-Core expects.

Its main branch has fixed that for 0.20: it cuts by the offsets without padding, where moved buckets would be the fault.
So nothing depends on a version: `cuts_at_padded_offsets` cuts a parameter out of a tiny buffer and looks at its value.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import megatron.core
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megagrow.errors import CheckpointError

_STATES = ("param", "exp_avg", "exp_avg_sq")


@contextmanager
def buckets_in_place() -> Iterator[None]:
    """While the block runs, gather distributed optimizers as this Megatron-Core cuts them.

    Raises:
        CheckpointError: there is padding between buckets, and how this Megatron-Core cuts them could not be found out.
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero

    def gathered(self: Any, *arguments: Any, **named: Any) -> Any:
        state = original(self, *arguments, **named)
        if state is None:  # this rank does not gather
            return state
        for index, buffer in enumerate(self.buffers):
            for content in state[index].values():
                for key in _STATES:
                    if key in content and _is_packed(content[key], buffer) and cuts_at_padded_offsets():
                        content[key] = _with_padding(content[key], buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = gathered
    try:
        yield
    finally:
        DistributedOptimizer.get_parameter_state_dp_zero = original


@cache
def cuts_at_padded_offsets() -> bool:
    """Whether Megatron-Core takes gathered buckets, which it packs end to end, for buckets with their padding.

    A buffer has two buckets, [1, 2, padding, padding] and [3, 4, 5, 6]; the parameter [3, 4] starts the second one.

    Raises:
        CheckpointError: Megatron-Core does neither the one nor the other.
    """
    packed = torch.arange(1.0, 7.0)
    parameter = torch.nn.Parameter(torch.zeros(2))
    buckets = [_bucket(0, 4, 2), _bucket(4, 4, 4)]
    buffer = SimpleNamespace(
        buckets=buckets, param_index_map={parameter: (4, 6, 1)}, numel=8, numel_unpadded=6, param_to_bucket={}
    )
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.gbuf_ranges, optimizer.buffers = [{"types": [{}, {}]}], [buffer]
    gathered = {0: {"types": {key: packed.clone() for key in _STATES}}, "buckets_coalesced": True}
    optimizer.get_parameter_state_dp_zero = lambda *_, **__: gathered
    try:
        model = {"weight": ShardedTensor.from_rank_offsets("weight", parameter)}
        cut = optimizer.sharded_param_state_fully_reshardable(model, is_loading=False, metadata={})
        found = cut[0]["param"].data.tolist()
    except Exception as error:  # another version may do anything with a stand-in
        found = f"{type(error).__name__}: {error}"
    if found not in ([3.0, 4.0], [5.0, 6.0]):
        raise CheckpointError(
            f"cannot save this optimizer: how Megatron-Core {megatron.core.__version__} cuts padded buckets could not "
            f"be found out ({found}); use Megatron-Core 0.16.1"
        )
    return bool(found == [5.0, 6.0])


def _bucket(offset: int, size: int, unpadded: int) -> Any:
    return SimpleNamespace(offset=offset, numel_unpadded=unpadded, grad_data=torch.zeros(size))


def _is_packed(gathered: torch.Tensor, buffer: Any) -> bool:
    """Whether buckets that have padding between them were gathered without it."""
    at = 0
    for bucket in buffer.buckets:
        if bucket.offset != at:
            return bool(gathered.numel() < buffer.buckets[-1].offset + buffer.buckets[-1].numel_unpadded)
        at += bucket.numel_unpadded
    return False


def _with_padding(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Return a buffer's values with each bucket at its offset, from buckets packed end to end."""
    placed, at = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        placed[bucket.offset :][: bucket.numel_unpadded] = packed[at:][: bucket.numel_unpadded]
        at += bucket.numel_unpadded
    return placed
