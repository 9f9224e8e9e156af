"""Loads Megatron's pickled objects without running any code that they contain.

`common.pt` and the small objects in `.distcp` files are torch.save archives. Each is loaded with an allow-list;
anything else is refused with the name that it would import. Nothing is ever loaded with `weights_only` off.
A checkpoint's index, `.metadata`, is read by `formats.torch_dist.index`, and tensors by `tensor_pickle`.

Megatron-LM also pickles its arguments, including enums and random states. Those become `UnimportedObject`s, and then
plain data, without importing Megatron or numpy: attributes become a dict, everything else text.
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
from megagrow.checkpoint.pickles.zip_reader import ArchiveMembers
from megagrow.errors import CheckpointError

_ARGUMENTS = ("argparse.Namespace", "types.SimpleNamespace")
_ALLOWED = (
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
"""What Megatron registers as safe with torch: all that its checkpoints contain besides plain values and tensors."""
_TYPES = {dtype.value: dtype for dtype in DType}
_MAX_PICKLE = 64 << 20
"""Largest pickle, in bytes, that is read without torch."""


class UnimportedObject:
    """An object whose class is not imported; `unimported_class` makes a subclass for each class name.

    Attributes:
        name: dotted name of the class.
        arguments, attributes: the constructor's arguments and the state, from the pickle.
    """

    name = ""

    def __new__(cls, *arguments: Any) -> "UnimportedObject":
        """Accept any arguments, and keep them."""
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


def unimported_class(name: str) -> type[UnimportedObject]:
    """Return a new class to replace the one of that dotted name, so that no pickle can change a class for the next."""
    return type(UnimportedObject.__name__, (UnimportedObject,), {"name": name})


def allowed_class(module: str, name: str) -> type[UnimportedObject] | None:
    """Return the replacement of a class; None if its name is not on the allow-list."""
    return unimported_class(f"{module}.{name}") if f"{module}.{name}" in _ALLOWED else None


def to_plain(value: Any, _done: dict[int, Any] | None = None) -> Any:
    """Return a value with arguments as dicts, and enums and other unimported objects as text, at any depth.

    Shared values stay shared, so a small pickle does not become a large value. RecursionError if one contains itself.
    """
    done: dict[int, Any] = {} if _done is None else _done
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, UnimportedObject) and value.name not in _ARGUMENTS:
        result = str(value)
    elif isinstance(value, UnimportedObject):
        result = to_plain(value.attributes, done)
    elif isinstance(value, argparse.Namespace):  # a running Megatron has registered the class itself
        result = to_plain(vars(value), done)
    elif isinstance(value, enum.Enum | PurePath) and not isinstance(value, DType):  # registered likewise
        result = str(value)
    elif f"{type(value).__module__}.{type(value).__qualname__}" == "torch.dtype":
        result = _TYPES.get(str(value).removeprefix("torch."), value)
    elif isinstance(value, dict):
        result = {to_plain(key, done): to_plain(each, done) for key, each in value.items()}
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        result = type(value)(to_plain(each, done) for each in value)
    done[id(value)] = result
    return result


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that accepts plain values, torch's dtypes and the allow-list, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of an allowed name; CheckpointError for any other."""
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if known := allowed_class(module, name):
            return known
        raise CheckpointError(f"{module}.{name} is not on the allow-list")


def load_archive(data: bytes | Path, where: str) -> Any:
    """Return the object in a torch.save archive, made `to_plain`.

    Most archives contain only plain values and allowed names, and are read without torch, whose import takes seconds.
    Where that fails, torch's own weights-only unpickler decides, and its errors become ours.

    Raises:
        CheckpointError: it is damaged, or would import a name that is not allowed.
    """
    try:
        return to_plain(_unpickled(data, where))
    except (CheckpointError, OSError, RecursionError):
        return _load_by_torch(data, where)


def _unpickled(data: bytes | Path, where: str) -> Any:
    if isinstance(data, bytes):
        return ArchiveMembers(data, 0, len(data), where).unpickle("data.pkl", _PlainUnpickler, _MAX_PICKLE)
    with open(data, "rb") as stream:
        members = ArchiveMembers(stream.fileno(), 0, data.stat().st_size, where)
        return members.unpickle("data.pkl", _PlainUnpickler, _MAX_PICKLE)


def _load_by_torch(data: bytes | Path, where: str) -> Any:
    import torch

    try:
        _check_plain_zip(data, where)
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        with torch.serialization.safe_globals([(unimported_class(name), name) for name in _ALLOWED]):
            return to_plain(torch.load(source, map_location="cpu", weights_only=True))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # a forbidden import, or damage in the pickle itself
        if names := _forbidden_imports(data):
            raise CheckpointError(f"{where}: refused: it would import {', '.join(names)}") from None
        raise CheckpointError(f"{where}: damaged, or contains more than plain values: {_first_line(error)}") from None
    except Exception as error:  # a damaged archive raises nearly anything
        raise CheckpointError(f"{where}: damaged: {type(error).__name__}: {_first_line(error)}") from None


def _check_plain_zip(data: bytes | Path, where: str) -> None:
    """Raise CheckpointError if an archive would unpack to more bytes than it has."""
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


def _forbidden_imports(data: bytes | Path) -> list[str]:
    """Return the names that an archive would import and that neither torch nor the allow-list accepts."""
    import torch

    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - set(_ALLOWED))
    except Exception:  # too damaged to find them
        return []


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
