"""Torch archives and pickles: read without running code from them, written without importing torch.

In import order: `scan` (with `walk`) and `dump` know pickles, `stand_ins` is all that a pickle gets hold of,
`zip_format` knows the archive; `tensor_pickle` is the pickle of tensors, `zip_reader` and `zip_writer` are the archives
around it; `state_pickle`, `plain`, `load` and `state_archive` read and write whole states.
"""

from megagrow.checkpoint.pickles.dump import dumps
from megagrow.checkpoint.pickles.load import load_archive, load_object
from megagrow.checkpoint.pickles.plain import to_plain
from megagrow.checkpoint.pickles.scan import check_pickle
from megagrow.checkpoint.pickles.stand_ins import ClosedUnpickler, Fixed, Function, StandIn, TypeName, stand_in_class
from megagrow.checkpoint.pickles.state_archive import StateArchive, tensor_stub
from megagrow.checkpoint.pickles.state_pickle import StateUnpickler
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor, TensorStub, TensorUnpickler
from megagrow.checkpoint.pickles.zip_reader import ArchivedValues, ArchiveMembers, ByteSource
from megagrow.checkpoint.pickles.zip_writer import save_small

__all__ = [
    "ArchiveMembers",
    "ArchivedValues",
    "ByteSource",
    "ClosedUnpickler",
    "Fixed",
    "Function",
    "StandIn",
    "StateArchive",
    "StateUnpickler",
    "TensorStub",
    "TensorUnpickler",
    "TypeName",
    "PickledTensor",
    "check_pickle",
    "dumps",
    "load_archive",
    "load_object",
    "stand_in_class",
    "to_plain",
    "save_small",
    "tensor_stub",
    "zip_format",
    "zip_reader",
    "zip_writer",
]
