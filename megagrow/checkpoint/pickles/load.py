"""Read what Megatron pickles without running what a stranger pickled.

`common.pt` and the small objects inside `.distcp` files are torch.save archives. Each is read by an allow-list;
anything else is refused with the name of what it wanted to import. Nothing here ever loads with `weights_only` off.
The index of a checkpoint, `.metadata`, is the affair of `torch_dist_index`, and tensors that of `archive`.

Megatron-LM also pickles its arguments, with the enums and random states in them. Stand-ins are made of these, so they
read as plain data where neither Megatron nor numpy is imported: attributes as a dict, the rest as text.
"""

import argparse
import enum
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.zip_reader import Members
from megagrow.errors import CheckpointError

_ARGUMENTS = ("argparse.Namespace", "types.SimpleNamespace")
_STAND_INS = (
    *_ARGUMENTS,
    "pathlib.PosixPath",
    "signal.Signals",
    "_io.BytesIO",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    *(f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "AttnMaskType", "CudaGraphScope")),
)
"""What Megatron registers as safe with torch: all that its own checkpoints hold besides plain values and tensors."""
_TYPES = {dtype.value: dtype for dtype in DType}
_MAX_PICKLE = 64 << 20
"""Bytes of a pickle that is read without torch."""


class StandIn:
    """Stands for an object of a class that is not imported; `stand_in` makes a subclass for each name."""

    name = ""

    def __new__(cls, *arguments: Any) -> "StandIn":
        """Make one of whatever the class itself would have been made of."""
        made = super().__new__(cls)
        made.arguments, made.attributes = arguments, {}
        return made

    def __init__(self, *arguments: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, Mapping) else {}

    def __str__(self) -> str:
        shown = (repr(each) if isinstance(each, str | int | float) else "..." for each in self.arguments)
        return f"{self.name}({', '.join(shown)})"


def stand_in(name: str) -> type[StandIn]:
    """A fresh class that stands for the one of that dotted name: whatever a pickle does to it ends with the pickle."""
    return type(StandIn.__name__, (StandIn,), {"name": name})


def stand_in_for(module: str, name: str) -> type[StandIn] | None:
    """A stand-in, where the allow-list has the name."""
    return stand_in(f"{module}.{name}") if f"{module}.{name}" in _STAND_INS else None


def plain(value: Any, _done: dict[int, Any] | None = None) -> Any:
    """A value with dicts for arguments and text for other stand-ins and enums, through dicts, lists and tuples.

    What is shared stays shared, so a small pickle does not become a large value; RecursionError where it holds itself.
    """
    done: dict[int, Any] = {} if _done is None else _done
    if id(value) in done:
        return done[id(value)]
    made = value
    if isinstance(value, StandIn) and value.name not in _ARGUMENTS:
        made = str(value)
    elif isinstance(value, StandIn):
        made = plain(value.attributes, done)
    elif isinstance(value, argparse.Namespace):  # a running Megatron has registered the class itself
        made = plain(vars(value), done)
    elif isinstance(value, enum.Enum | PurePath) and not isinstance(value, DType):  # registered likewise
        made = str(value)
    elif f"{type(value).__module__}.{type(value).__qualname__}" == "torch.dtype":
        made = _TYPES.get(str(value).removeprefix("torch."), value)
    elif isinstance(value, dict):
        made = {plain(key, done): plain(each, done) for key, each in value.items()}
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        made = type(value)(plain(each, done) for each in value)
    done[id(value)] = made
    return made


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows plain values, types of values and stand-ins, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; CheckpointError for all others."""
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if known := stand_in_for(module, name):
            return known
        raise CheckpointError(f"{module}.{name} is for torch to judge")


def load_archive(data: bytes | Path, where: str) -> Any:
    """Return the object of a torch.save archive, made `plain`.

    Most hold no more than plain values and stand-ins, and are read without torch, whose import takes seconds. All that
    is not so, or not well, is left to torch's own unpickler of weights, and to what is made of its errors.

    CheckpointError if it is damaged or needs a foreign import.
    """
    try:
        return plain(_unpickled(data, where))
    except (CheckpointError, OSError, RecursionError):
        return _load_by_torch(data, where)


def _unpickled(data: bytes | Path, where: str) -> Any:
    if isinstance(data, bytes):
        return Members(data, 0, len(data), where).unpickle("data.pkl", _PlainUnpickler, _MAX_PICKLE)
    with open(data, "rb") as stream:
        members = Members(stream.fileno(), 0, data.stat().st_size, where)
        return members.unpickle("data.pkl", _PlainUnpickler, _MAX_PICKLE)


def _load_by_torch(data: bytes | Path, where: str) -> Any:
    import torch

    try:
        _check_plain_zip(data, where)
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        with torch.serialization.safe_globals([(stand_in(name), name) for name in _STAND_INS]):
            return plain(torch.load(source, map_location="cpu", weights_only=True))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # foreign, or damaged in the pickle itself
        if names := _foreign(data):
            raise CheckpointError(f"{where}: refused: it would import {', '.join(names)}") from None
        raise CheckpointError(f"{where}: damaged, or more than plain values: {_first_line(error)}") from None
    except Exception as error:  # a damaged archive raises nearly anything
        raise CheckpointError(f"{where}: damaged: {type(error).__name__}: {_first_line(error)}") from None


def _check_plain_zip(data: bytes | Path, where: str) -> None:
    """Raise CheckpointError where an archive would unpack to more than it is."""
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    if not zipfile.is_zipfile(source):
        return  # of torch before 1.6, or damaged
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{where}: refused: it is compressed, which torch never writes")
    if (unpacked := sum(member.file_size for member in members)) > size:
        raise CheckpointError(f"{where}: refused: {unpacked} bytes in an archive of {size}")


def _foreign(data: bytes | Path) -> list[str]:
    """Names that an archive would import and that torch does not count as safe."""
    import torch

    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - set(_STAND_INS))
    except Exception:  # too damaged to say more
        return []


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
