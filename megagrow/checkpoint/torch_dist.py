"""Megatron's torch_dist format by slice: no model, no process group, no megatron.

A checkpoint is a directory: `.metadata` (which chunk of which tensor lies where), `*.distcp` (chunks, each a small
torch.save archive), `common.pt` (what is not sharded; newer Megatron has an object `common_state` instead) and
`metadata.json` (the format, written last). A tensor has one global shape however it was cut, so a reader that
assembles any slice from the chunks that meet it is all that resharding needs, and a writer may cut as it likes.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megagrow.checkpoint.archive import save_small
from megagrow.checkpoint.canonical import canonical_common, canonical_index
from megagrow.checkpoint.dtypes import DType
from megagrow.checkpoint.files import ChunkReader
from megagrow.checkpoint.safe_pickle import load_archive
from megagrow.checkpoint.store import check_cover
from megagrow.checkpoint.torch_dist_index import Entry, Place, read_index, write_index
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 4 << 30
"""A data file of the writer is closed once it is larger."""
COMMON_STATE = "common_state"
"""Key of the object in which newer Megatron keeps what else lies in common.pt."""


class Reader(ChunkReader):
    """Reads slices of a torch_dist checkpoint, or of any that torch.distributed.checkpoint wrote.

    Attributes:
        path: the directory.
        tensors: by canonical key, however they are spelled in the checkpoint (`canonical`).
        objects: small pickled objects by key, each an archive in a file.
    """

    def __init__(self, path: Path, *, megatron: bool = True) -> None:
        """Read the index; CheckpointError if the directory is not whole.

        Args:
            path: the directory.
            megatron: it must be Megatron's, not just torch's.
        """
        if megatron:
            check_format(path)
        tensors, objects = read_index(path / ".metadata")
        super().__init__(path, tensors, objects)
        self.check_extents()
        for key, info in tensors.items():
            check_cover(f"{path / '.metadata'}: {key}", info)
        self.tensors = canonical_index(tensors)

    def common(self) -> dict[str, Any]:
        """Return what is not sharded, as canonical tensors have it; CheckpointError if it is damaged or foreign."""
        file = self.path / "common.pt"
        if file.is_file():
            content, where = load_archive(file, str(file)), str(file)
        else:
            key = next(key for key in self.objects if _is_common_state(key))
            content, where = unlisted(self.read_object(key)), f"{self.path}: {key}"
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: holds {type(content).__name__}, not keys and values")
        return canonical_common(content)


class Writer:
    """Writes a torch_dist checkpoint into an empty directory, chunk by chunk, in any order, with all of it in hand.

    Nothing that a reader takes for a checkpoint is there before `finish`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shapes: dict[str, tuple[tuple[int, ...], DType]] = {}
        self._entries: list[Entry] = []
        self._objects: dict[str, Place] = {}
        self._stream: BinaryIO | None = None
        self._files = 0

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: "Tensor") -> None:
        """Add a chunk of the tensor `key` of global `shape`, whose first entry lies at `offset`."""
        known = self._shapes.setdefault(key, (tuple(shape), DType.of(values.dtype)))
        assert known == (tuple(shape), DType.of(values.dtype)), key
        place = self._store(values.contiguous().clone())
        self._entries.append(Entry(key, tuple(offset), tuple(values.shape), place))

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""
        self._objects[key] = self._store(value)

    def finish(self, common: dict[str, Any]) -> None:
        """Write what is not sharded and the index, and last the file that makes it a checkpoint."""
        self._close()
        write_index(self.path, self._shapes, self._entries, self._objects, common)

    def _store(self, value: Any) -> Place:
        content, stream = save_small(value), self._open()
        offset = stream.tell()
        stream.write(content)
        place = (Path(stream.name).name, offset, len(content))
        if offset + len(content) > MAX_FILE_BYTES:
            self._close()
        return place

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self._stream = open(self.path / f"__0_{self._files}.distcp", "wb")
            self._files += 1
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None


def check_format(path: Path) -> None:
    """Raise CheckpointError unless the directory says that it is a whole torch_dist checkpoint."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: {name} is missing")
    try:
        found = json.loads((path / "metadata.json").read_text())
        backend, version = found["sharded_backend"], found["sharded_backend_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'metadata.json'}: damaged: {type(error).__name__}: {error}") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(f"{path}: format {backend} version {version}; only torch_dist version 1 is read")
    if not (path / "common.pt").is_file() and COMMON_STATE.encode() not in (path / ".metadata").read_bytes():
        raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: common.pt is missing")


def unlisted(value: Any) -> Any:
    """An object out of the list in which Megatron-Core keeps each."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_common_state(key: str) -> bool:
    return key == COMMON_STATE or key.startswith(COMMON_STATE + "/")
