"""Loads Megatron's pickled objects without running any code that they contain.

`common.pt` and the small objects in `.distcp` files are torch.save archives. They are read by our own unpickler with an
allow-list; anything else is refused with the name that it would import. Torch's loader is never called: it hands out
live classes, and it allocates what a pickle asks for. Torch is imported only if there are tensors.

A checkpoint's index, `.metadata`, is read by `formats.torch_dist.index`, and large tensors by `reading`.
"""

import os
from pathlib import Path
from typing import Any

from megagrow.checkpoint.pickles.plain import to_plain
from megagrow.checkpoint.pickles.state_pickle import StateUnpickler
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor
from megagrow.checkpoint.pickles.zip_reader import ArchiveMembers
from megagrow.errors import CheckpointError

_MAX_PICKLE = 16 << 20
"""Largest pickle of an object, in bytes."""
_MAX_TENSORS = 256 << 20
"""Bytes of all tensors in an object; large tensors are never stored in one."""


def load_archive(data: bytes | Path, where: str) -> Any:
    """Return the object in a torch.save archive, made `to_plain`; its tensors are torch's.

    Raises:
        CheckpointError: it is damaged or too large, or would import a name that is not allowed.
    """
    if isinstance(data, bytes):
        return load_object(data, 0, len(data), where)
    try:
        with open(data, "rb") as stream:
            return load_object(stream.fileno(), 0, os.fstat(stream.fileno()).st_size, where)
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror}") from None


def load_object(source: int | bytes, offset: int, length: int, where: str) -> Any:
    """Return the object in an archive that is a range of a file, given by its descriptor, or of bytes."""
    start = source[offset : offset + 1] if isinstance(source, bytes) else os.pread(source, 1, offset)
    if start == b"\x80":
        raise CheckpointError(f"{where}: refused: written by torch before 1.6: load and save it again with a newer one")
    members = ArchiveMembers(source, offset, length, where)
    tensors = _Tensors(members)
    found = members.unpickle("data.pkl", StateUnpickler, _MAX_PICKLE)
    try:
        return to_plain(found, tensors.make)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


class _Tensors:
    """Makes the tensors of an archive. Those that share a storage in it share one here."""

    def __init__(self, members: ArchiveMembers) -> None:
        self._members = members
        self._storages: dict[str, bytearray] = {}
        self._bytes = 0

    def make(self, view: PickledTensor) -> Any:
        """Return a tensor with its values; CheckpointError if they are missing or too many."""
        import torch

        self._members.payload(view)
        member, dtype = view.storage.member, view.storage.dtype
        if member not in self._storages:
            self._bytes += view.storage.numel * dtype.itemsize
            if self._bytes > _MAX_TENSORS:
                raise CheckpointError(f"refused: its tensors have more than {_MAX_TENSORS >> 20} MiB")
            self._storages[member] = bytearray(self._members.read(f"data/{member}", _MAX_TENSORS))
        if not self._storages[member]:
            return torch.empty(view.shape, dtype=dtype.torch)
        flat = torch.frombuffer(self._storages[member], dtype=dtype.torch)
        return flat.as_strided(view.shape, view.strides, view.start)
