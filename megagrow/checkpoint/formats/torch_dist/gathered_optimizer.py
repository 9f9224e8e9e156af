"""Megatron-Core's older `dp_zero_gather_scatter` optimizer: flat buffers that were gathered into one object a rank.

It is what Megatron-LM up to 0.14 saves with `--no-ckpt-fully-parallel-save`, and later ones with
`--dist-ckpt-save-pre-mcore-014` beside it. The object of a model-parallel rank holds what its `distrib_optim.pt` would:
for each model chunk one buffer a state, its buckets end to end. Only the object's pickle is read here; where the
values lie in its archive follows from that, so a buffer becomes a tensor in a file like any other.

Source: Megatron-Core 0.14.0 to 0.16.1, `optimizer/distrib_optimizer.py`, `sharded_param_state_dp_zero`.
"""

import re
from collections.abc import Iterator

from megagrow.checkpoint.formats.megatron_common import StateUnpickler, unlisted
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index import Chunk, TensorInfo
from megagrow.checkpoint.pickles import Members, View
from megagrow.checkpoint.reading import Files
from megagrow.checkpoint.tensors import OPTIMIZER_STATES
from megagrow.errors import CheckpointError

GROUP = r"^(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\."
"""What keys of a model-parallel rank's part of an optimizer begin with: the optimizer's number and the rank's."""
_STATE = re.compile(f"(?P<group>{GROUP})param_state/shard_")


def gathered_buffers(reader: TorchDistReader) -> dict[str, TensorInfo]:
    """Return the flat buffers of gathered optimizers, each as the only bucket of one that was not; mostly none.

    CheckpointError if an object is damaged, would import something foreign, or holds something else.
    """
    files = Files(reader.path)
    try:
        objects = [(match["group"], key) for key in reader.objects if (match := _STATE.match(key))]
        return {
            f"{group}{name}": info
            for group, key in objects
            for name, info in _buffers(files, reader.objects[key], f"{reader.path}: {key}")
        }
    finally:
        files.close()


def _buffers(files: Files, place: Chunk, where: str) -> Iterator[tuple[str, TensorInfo]]:
    """The buffers of one rank's object, under the end of their name."""
    members = Members(files.handle(place.path), place.offset, place.length, where)
    content = unlisted(members.unpickle("data.pkl", StateUnpickler))
    try:
        coalesced = content["buckets_coalesced"]
        views = [
            (f"gbuf_idx_{chunk}.dtype_({', '.join(map(str, dtypes))}).bucket_idx_0.{state}", buffer[state])
            for chunk in sorted(key for key in content if isinstance(key, int))
            for dtypes, buffer in content[chunk].items()
            for state in OPTIMIZER_STATES
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: damaged: not a gathered optimizer: {type(error).__name__}: {error}") from None
    if not coalesced:
        raise CheckpointError(f"{where}: its buckets lie apart, as before February 2024, which is not read")
    for name, view in views:
        if not isinstance(view, View) or len(view.shape) != 1 or view.strides != (1,):
            raise CheckpointError(f"{where}: damaged: {name} is not a flat buffer")
        yield name, _info(members, view, place)


def _info(members: Members, view: View, place: Chunk) -> TensorInfo:
    """A buffer as a tensor whose one chunk is where it lies in the file."""
    payload = members.payload(view)
    (size,) = view.shape
    chunk = Chunk(((0, size),), place.path, payload.offset, size * payload.dtype.itemsize, strides=(1,))
    return TensorInfo((size,), payload.dtype, (chunk,))
