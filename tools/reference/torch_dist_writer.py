"""Write a torch_dist checkpoint chunk by chunk, with all of it in hand: for tests and benchmarks."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megagrow.checkpoint.formats.torch_dist import ArchiveLocation, ChunkEntry, write_index
from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import save_small

if TYPE_CHECKING:
    from torch import Tensor
MAX_FILE_BYTES = 4 << 30
"""A data file of the writer is closed once it is larger."""


class Writer:
    """Writes a torch_dist checkpoint into an empty directory, chunk by chunk, in any order, with all of it in hand.

    Nothing that a reader takes for a checkpoint is there before `finish`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shapes: dict[str, tuple[tuple[int, ...], DType]] = {}
        self._entries: list[ChunkEntry] = []
        self._objects: dict[str, ArchiveLocation] = {}
        self._stream: BinaryIO | None = None
        self._files = 0

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: "Tensor") -> None:
        """Add a chunk of the tensor `key` of global `shape`, whose first entry lies at `offset`."""
        known = self._shapes.setdefault(key, (tuple(shape), DType.of(values.dtype)))
        assert known == (tuple(shape), DType.of(values.dtype)), key
        place = self._store(values.contiguous().clone())
        self._entries.append(ChunkEntry(key, tuple(offset), tuple(values.shape), place))

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""
        self._objects[key] = self._store(value)

    def finish(self, common: dict[str, Any]) -> None:
        """Write what is not sharded and the index, and last the file that makes it a checkpoint."""
        self._close()
        write_index(self.path, self._shapes, self._entries, self._objects, common)

    def _store(self, value: Any) -> ArchiveLocation:
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
