"""Index Megatron-Core's older `dp_zero_gather_scatter` optimizer: flat buffers gathered into one object per rank.

Megatron-LM up to 0.14 saves it with `--no-ckpt-fully-parallel-save`, later versions if
`--dist-ckpt-save-pre-mcore-014` is given as well. The object of a model-parallel rank contains what `distrib_optim.pt`
contains in the legacy format: for each model chunk one buffer per state, with its buckets end to end. Only the
object's pickle is read here. It gives the position of the values in the archive, so a buffer becomes a tensor in a
file like any other.

Source: Megatron-Core 0.14.0 to 0.16.1, `optimizer/distrib_optimizer.py`, `sharded_param_state_dp_zero`.
"""

import re
from collections.abc import Iterator

from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader, unwrapped_object
from megagrow.checkpoint.index import Chunk, TensorInfo
from megagrow.checkpoint.pickles import ArchiveMembers, PickledTensor, StateUnpickler
from megagrow.checkpoint.reading import Files
from megagrow.checkpoint.tensors import OPTIMIZER_STATES
from megagrow.errors import CheckpointError

GROUP = r"^(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\."
"""Prefix of the keys of an optimizer's part on a model-parallel rank: number of the optimizer, number of the rank."""
_STATE = re.compile(f"(?P<group>{GROUP})param_state/shard_")


def gathered_buffers(reader: TorchDistReader) -> dict[str, TensorInfo]:
    """Return the flat buffers of gathered optimizers, each under the key of a `dp_reshardable` one's only bucket.

    The result is empty for any other checkpoint. CheckpointError if an object is damaged or unsafe.
    """
    files = Files(reader.path, checksums=reader.checksums)
    try:
        objects = [(match["group"], key) for key in reader.objects if (match := _STATE.match(key))]
        return {
            f"{group}{name}": info
            for group, key in objects
            for name, info in _buffers(files, reader.objects[key], f"{reader.path}: {key}")
        }
    finally:
        files.close()


def _buffers(files: Files, archive: Chunk, where: str) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the buffers of one rank's object, each with the end of its key."""
    members = ArchiveMembers(files.source(archive.path), archive.offset, archive.length, where)
    content = unwrapped_object(members.unpickle("data.pkl", StateUnpickler))
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
        raise CheckpointError(
            f"{where}: its buckets are stored separately, as before February 2024, which is not supported"
        )
    for name, view in views:
        if not isinstance(view, PickledTensor) or len(view.shape) != 1 or view.strides != (1,):
            raise CheckpointError(f"{where}: damaged: {name} is not a flat buffer")
        yield name, _info(members, view, archive)


def _info(members: ArchiveMembers, view: PickledTensor, archive: Chunk) -> TensorInfo:
    """Return a buffer as a tensor with one chunk: the bytes of the buffer in the file."""
    payload = members.payload(view)
    (size,) = view.shape
    chunk = Chunk(((0, size),), archive.path, payload.offset, size * payload.dtype.itemsize, strides=(1,))
    return TensorInfo((size,), payload.dtype, (chunk,))
