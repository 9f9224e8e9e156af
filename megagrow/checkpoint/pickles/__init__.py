"""Torch archives and pickles: read without running code from them, written without importing torch.

In import order: `scan` and `dump` know pickles, `zip_format` the archive; `tensor_pickle` is the pickle of tensors,
`zip_reader` and `zip_writer` are the archives around it; `load` and `state_archive` read and write whole states.
"""

from megagrow.checkpoint.pickles.dump import dumps
from megagrow.checkpoint.pickles.load import allowed_class, load_archive, to_plain, unimported_class
from megagrow.checkpoint.pickles.scan import check_pickle
from megagrow.checkpoint.pickles.state_archive import StateArchive, tensor_stub
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor, TensorStub, TensorUnpickler
from megagrow.checkpoint.pickles.zip_reader import ArchivedValues, ArchiveMembers, ByteSource
from megagrow.checkpoint.pickles.zip_writer import save_small

__all__ = [
    "ArchiveMembers",
    "ArchivedValues",
    "ByteSource",
    "StateArchive",
    "TensorStub",
    "TensorUnpickler",
    "PickledTensor",
    "check_pickle",
    "dumps",
    "load_archive",
    "to_plain",
    "save_small",
    "unimported_class",
    "allowed_class",
    "tensor_stub",
    "zip_format",
    "zip_reader",
    "zip_writer",
]
