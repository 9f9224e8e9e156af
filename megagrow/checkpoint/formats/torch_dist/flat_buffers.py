"""The flat buffers of an optimizer as a checkpoint stores them, by model-parallel rank and model chunk.

Megatron-Core saves a `dp_reshardable` optimizer bucket by bucket: one 1-D tensor per state, cut over data-parallel
ranks, under keys that name rank, chunk, types and bucket but not the content. Small objects next to them record the
sizes of the buckets. The older gathered layout is indexed under the same keys, with one bucket (`gathered_optimizer`).
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from megagrow.checkpoint.formats.torch_dist.gathered_optimizer import GROUP
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader, unwrapped_object
from megagrow.checkpoint.index import TensorInfo
from megagrow.checkpoint.tensors import OPTIMIZER_STATES
from megagrow.errors import CheckpointError

BUCKET_KEY = re.compile(GROUP + r"gbuf_idx_(\d+)\.dtype_\((.*)\)\.bucket_idx_(\d+)\.(\w+)$")
"""Key of a bucket; groups: optimizer, model-parallel rank, model chunk, types, bucket, state."""
OBJECT_KEY = re.compile(GROUP + r"(\w+)/shard_")
"""Key of an optimizer's small object; groups: optimizer, model-parallel rank, name."""


@dataclass
class FlatBuffer:
    """The flat buffer of one model chunk on one model-parallel rank.

    Attributes:
        dtypes: types of its parameters and gradients, as text.
        gathered: whether its buckets are stored end to end as one.
        buckets: the 1-D tensor of each state, by bucket and state.
    """

    dtypes: str
    gathered: bool
    buckets: dict[int, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def bucket_sizes(self) -> list[int]:
        """Number of values in each bucket."""
        return [self.buckets[bucket]["param"].shape[0] for bucket in sorted(self.buckets)]


FlatBuffers = dict[tuple[int, int], FlatBuffer]
"""An optimizer's buffers by model-parallel rank and model chunk."""


def optimizer_numbers(keys: Iterable[str]) -> list[int]:
    """Return the numbers of the optimizers: one, or one for dense parameters and one for those of experts."""
    numbers = {int(match[1] or 0) for key in keys if (match := BUCKET_KEY.match(key))}
    if sorted(numbers) not in ([0], [0, 1]):
        raise CheckpointError(f"there are {len(numbers)} optimizers; supported are one, and a second one for experts")
    return sorted(numbers)


def read_buffers(
    reader: TorchDistReader, flat: Mapping[str, TensorInfo], optimizer: int, *, gathered: bool
) -> FlatBuffers:
    """Return the flat buffers of one optimizer, checked against the sizes that the checkpoint records.

    Args:
        reader: the checkpoint.
        flat: its buckets by key.
        optimizer: number of the optimizer.
        gathered: whether buckets are stored end to end.

    Raises:
        CheckpointError: the buffers are not those of Adam, have several types, or differ from the recorded sizes.
    """
    buffers: FlatBuffers = {}
    for key, info in flat.items():
        match = BUCKET_KEY.match(key)
        if match and int(match[1] or 0) == optimizer:
            buffer = buffers.setdefault((int(match[2]), int(match[3])), FlatBuffer(match[4], gathered))
            ordered = sorted(info.chunks, key=lambda chunk: chunk.box)
            buffer.buckets[int(match[5])][match[6]] = replace(info, chunks=tuple(ordered))
    if len(types := {buffer.dtypes for buffer in buffers.values()}) > 1:
        raise CheckpointError(f"parameters of several types ({'; '.join(sorted(types))}); only one type is supported")
    for buffer in buffers.values():
        for states in buffer.buckets.values():
            if set(states) != set(OPTIMIZER_STATES) or not states["param"].dtype.is_floating_point:
                found = {name: str(info.dtype) for name, info in states.items()}
                raise CheckpointError(f"its states are {found}; supported are Adam's: {', '.join(OPTIMIZER_STATES)}")
    _check_recorded_sizes(reader, buffers, optimizer)
    return buffers


def _check_recorded_sizes(reader: TorchDistReader, buffers: FlatBuffers, optimizer: int) -> None:
    """Raise CheckpointError if a recorded bucket size is not the size of the stored bucket."""
    for key in reader.objects:
        match = OBJECT_KEY.match(key)
        if match and int(match[1] or 0) == optimizer and match[3] == "per_bucket_numel_unpadded":
            recorded = _recorded_sizes(reader, key)
            stored = [buffers[place].bucket_sizes for place in sorted(buffers) if place[0] == int(match[2])]
            if recorded != stored:
                raise CheckpointError(f"{key} records {recorded} values, but the buckets hold {stored}")


def _recorded_sizes(reader: TorchDistReader, key: str) -> list[list[int]]:
    """Return the bucket sizes that an object records for a rank, by buffer; CheckpointError if it is damaged."""
    content = unwrapped_object(reader.read_object(key))
    try:
        return [list(next(iter(buffer.values()))) for buffer in content]
    except (AttributeError, StopIteration, TypeError) as error:
        raise CheckpointError(f"{key}: damaged: no bucket sizes: {type(error).__name__}: {error}") from None


def ranks_and_chunks(buffers: FlatBuffers) -> tuple[int, int]:
    """Return the number of model-parallel ranks and of model chunks on each; CheckpointError if a buffer is missing."""
    ranks, chunks = ({place[index] for place in buffers} for index in (0, 1))
    if set(buffers) != set(itertools.product(range(len(ranks)), range(len(chunks)))):
        raise CheckpointError(f"buffers are missing: found {sorted(buffers)} (model-parallel rank, model chunk)")
    return len(ranks), len(chunks)
