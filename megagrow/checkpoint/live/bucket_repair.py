"""Fixes how Megatron-Core gathers a distributed optimizer to save it.

The optimizer's buffers are cut into buckets, each padded at its end. Version 0.16.1 (and 0.19, whose source names the
symptom "issue #504") gathers the buckets without their padding, and then cuts parameters out of the result by their
offsets with padding. So with more than one bucket, which tied embeddings under pipeline parallelism produce, every
parameter after the first padding is saved shifted, under another parameter's name, without any error. Loading goes by
parameter and is correct. Here the gathered buckets are moved to the offsets that Megatron-Core expects.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATES = ("param", "exp_avg", "exp_avg_sq")


@contextmanager
def buckets_in_place() -> Iterator[None]:
    """While the block runs, gather distributed optimizers with their padding."""
    original = DistributedOptimizer.get_parameter_state_dp_zero

    def gathered(self: Any, *arguments: Any, **named: Any) -> Any:
        state = original(self, *arguments, **named)
        if state is None:  # this rank does not gather
            return state
        for index, buffer in enumerate(self.buffers):
            for content in state[index].values():
                for key in _STATES:
                    if key in content:
                        content[key] = _with_padding(content[key], buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = gathered
    try:
        yield
    finally:
        DistributedOptimizer.get_parameter_state_dp_zero = original


def _with_padding(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Return a buffer's values with each bucket at its offset, from buckets packed end to end."""
    placed, at = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        placed[bucket.offset :][: bucket.numel_unpadded] = packed[at:][: bucket.numel_unpadded]
        at += bucket.numel_unpadded
    return placed
