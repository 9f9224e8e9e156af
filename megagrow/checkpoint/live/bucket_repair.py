"""A repair of how Megatron-Core gathers a distributed optimizer that it saves.

Its buffers are cut into buckets, each padded at its end. Version 0.16.1 (and 0.19, by its source, which names the
symptom "issue #504") gathers the buckets without their padding and then cuts parameters out of the result by their
places with it. So with more than one bucket, as tied embeddings under pipeline parallelism make them, every parameter
behind the first padding is saved shifted, under another's name, and nothing tells. Loading goes by parameter and is
right. Here the gathered buckets are put back where the places expect them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATES = ("param", "exp_avg", "exp_avg_sq")


@contextmanager
def buckets_in_place() -> Iterator[None]:
    """While the block runs, distributed optimizers are gathered with their padding."""
    original = DistributedOptimizer.get_parameter_state_dp_zero

    def gathered(self: Any, *arguments: Any, **named: Any) -> Any:
        state = original(self, *arguments, **named)
        if state is None:  # not a rank that gathers
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
    """A buffer's values, of which the buckets lie end to end, each bucket at its own place."""
    placed, at = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        placed[bucket.offset :][: bucket.numel_unpadded] = packed[at:][: bucket.numel_unpadded]
        at += bucket.numel_unpadded
    return placed
