"""Torch archives and pickles: read without running code from them, written without importing torch.

In import order: `scan` and `dump` know pickles, `zip_format` the archive; `tensor_pickle` is the pickle of tensors,
`zip_reader` and `zip_writer` are the archives around it; `load` and `state_archive` read and write whole states.
"""

from megagrow.checkpoint.pickles.dump import dumps
from megagrow.checkpoint.pickles.load import load_archive, plain, stand_in, stand_in_for
from megagrow.checkpoint.pickles.scan import check_pickle
from megagrow.checkpoint.pickles.state_archive import StateArchive, stub
from megagrow.checkpoint.pickles.tensor_pickle import TensorStub, TensorUnpickler, View
from megagrow.checkpoint.pickles.zip_reader import Members, Payload
from megagrow.checkpoint.pickles.zip_writer import save_small

__all__ = [
    "Members",
    "Payload",
    "StateArchive",
    "TensorStub",
    "TensorUnpickler",
    "View",
    "check_pickle",
    "dumps",
    "load_archive",
    "plain",
    "save_small",
    "stand_in",
    "stand_in_for",
    "stub",
    "zip_format",
    "zip_reader",
    "zip_writer",
]
