"""Read what Megatron pickles without running what a stranger pickled.

Three kinds of pickle lie in a torch_dist checkpoint: `.metadata` (plain dataclasses of torch), `common.pt` and the
small objects inside `.distcp` files (torch.save archives). Each is read by an allow-list; anything else is refused
with the name of what it wanted to import. Nothing here ever loads with `weights_only` off.
"""

import io
import pickle
from pathlib import Path
from typing import IO, Any

import torch

from megagrow.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    *(
        ("torch", name)
        for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    ),
}


class _Restricted(pickle.Unpickler):
    """An unpickler that imports nothing but the allow-list."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            wanted = " ".join(f"{module}.{name}".split())
            raise CheckpointError(f"{self._path}: refused: it would import {wanted}, which no checkpoint needs")
        return super().find_class(module, name)


def load_metadata(path: Path) -> Any:
    """Return the `.metadata` of a torch_dist checkpoint; CheckpointError if it is damaged or foreign."""
    try:
        with open(path, "rb") as stream:
            return _Restricted(stream, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {_first_line(error)}") from None


def load_archive(data: bytes | Path, where: str) -> Any:
    """Return the object of a torch.save archive; CheckpointError if it is damaged or needs a foreign import."""
    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # foreign, or damaged in the pickle itself
        if names := _foreign(data):
            raise CheckpointError(f"{where}: refused: it would import {', '.join(names)}") from None
        raise CheckpointError(f"{where}: damaged, or more than plain values: {_first_line(error)}") from None
    except Exception as error:  # a damaged archive raises nearly anything
        raise CheckpointError(f"{where}: damaged: {type(error).__name__}: {_first_line(error)}") from None


def _foreign(data: bytes | Path) -> list[str]:
    """Names that an archive would import and that torch does not count as safe."""
    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:  # too damaged to say more
        return []


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
