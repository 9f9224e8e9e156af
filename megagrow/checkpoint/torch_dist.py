"""Megatron's torch_dist format by slice: no model, no process group, no megatron.

A checkpoint is a directory: `.metadata` (which chunk of which tensor lies where), `*.distcp` (chunks, each a small
torch.save archive), `common.pt` (what is not sharded) and `metadata.json` (the format, written last). A tensor has
one global shape however it was cut, so a reader that assembles any slice from the chunks that meet it is all that
resharding needs, and a writer may cut as it likes.
"""

import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megagrow.checkpoint.per_layer import stack_layers
from megagrow.checkpoint.safe_pickle import load_archive, load_metadata
from megagrow.errors import CheckpointError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAX_FILE_BYTES = 4 << 30
"""A data file of the writer is closed once it is larger."""

Box = tuple[tuple[int, int], ...]
"""Start and stop in every dimension of a global tensor."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor in a file: its box, and where its archive lies; `bare` if that lacks the layer dimension."""

    box: Box
    path: str
    offset: int
    length: int
    bare: bool = False


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """Reads slices of a torch_dist checkpoint.

    Attributes:
        path: the directory.
        tensors: by key, layers stacked also where the checkpoint has a key for each.
        objects: small pickled objects by key, each an archive in a file.
    """

    def __init__(self, path: Path) -> None:
        """Read the index; CheckpointError if the directory is not a whole torch_dist checkpoint."""
        self.path = path
        check_format(path)
        metadata = load_metadata(path / ".metadata")
        try:
            self.tensors, self.objects = _index(metadata)
        except Exception as error:  # an index that is whole as a pickle may still hold anything
            what = " ".join(str(error).split())
            raise CheckpointError(f"{path / '.metadata'}: damaged: {type(error).__name__}: {what}") from None
        self._check_extents()
        for key, info in self.tensors.items():
            _check_cover(f"{path / '.metadata'}: {key}", info)
        self.tensors = stack_layers(self.tensors)

    def read(self, key: str, box: Box) -> Tensor:
        """Return the values of a box of a tensor, in its shape and dtype; CheckpointError if a part is missing."""
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor {key}")
        result = torch.empty([stop - start for start, stop in box], dtype=info.dtype)
        covered = 0
        for chunk in info.chunks:
            common = _intersect(chunk.box, box)
            if common is None:
                continue
            values = self._load(chunk, key, info)
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            part = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, chunk.box, strict=True))
            result[into] = values[part]
            covered += math.prod(b - a for a, b in common)
        if covered != result.numel():
            raise CheckpointError(
                f"{self.path}: {key}: its chunks hold {covered} of {result.numel()} values of {list(box)}"
            )
        return result

    def read_whole(self, key: str) -> Tensor:
        """Return a whole tensor."""
        return self.read(key, tuple((0, size) for size in self.tensors[key].shape))

    def read_object(self, key: str) -> Any:
        """Return a small object; CheckpointError if it is damaged or would import something foreign."""
        chunk = self.objects[key]
        return load_archive(self._bytes(chunk), f"{self.path / chunk.path}: {key}")

    def common(self) -> dict[str, Any]:
        """Return the content of common.pt; CheckpointError if it is damaged or would import something foreign."""
        content = load_archive(self.path / "common.pt", str(self.path / "common.pt"))
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.path / 'common.pt'}: holds {type(content).__name__}, not keys and values")
        return content

    def _load(self, chunk: Chunk, key: str, info: TensorInfo) -> Tensor:
        values = load_archive(self._bytes(chunk), f"{self.path / chunk.path}: {key}")
        expected = tuple(stop - start for start, stop in chunk.box)
        if chunk.bare and isinstance(values, Tensor):
            values = values.unsqueeze(0)
        if not isinstance(values, Tensor) or tuple(values.shape) != expected or values.dtype != info.dtype:
            what = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise CheckpointError(f"{self.path / chunk.path}: {key}: holds {what}, not {expected} {info.dtype}")
        return values

    def _bytes(self, chunk: Chunk) -> bytes:
        with open(self.path / chunk.path, "rb") as stream:
            stream.seek(chunk.offset)
            return stream.read(chunk.length)

    def _check_extents(self) -> None:
        """Raise CheckpointError where the index points outside its directory or past the end of a file."""
        ends: dict[str, int] = {}
        for chunk in self._chunks():
            ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.offset + chunk.length)
        for name, end in ends.items():
            file = self.path / name
            if Path(name).name != name:  # before anything is asked of the file system
                raise CheckpointError(f"{self.path / '.metadata'}: refused: points outside its directory: {name}")
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size < end:
                raise CheckpointError(f"{file}: cut short: {file.stat().st_size} bytes, its index needs {end}")

    def _chunks(self) -> Iterator[Chunk]:
        for info in self.tensors.values():
            yield from info.chunks
        yield from self.objects.values()


@dataclass(frozen=True)
class Written:
    """What one of several writers has put into its files."""

    tensors: dict[str, TensorStorageMetadata]
    objects: dict[str, BytesStorageMetadata]
    storage: dict[MetadataIndex, _StorageInfo]
    bytes: int


class Writer:
    """Writes a torch_dist checkpoint into an empty directory, chunk by chunk, in any order.

    Several may write into one directory, each a `part` with files of its own; one of them takes in what the others
    have `written` and finishes. Nothing that a reader takes for a checkpoint is there before `finish`.
    """

    def __init__(self, path: Path, part: int = 0) -> None:
        self.path = path
        self._part = part
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._stream: BinaryIO | None = None
        self._files = 0
        self.bytes_written = 0

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: Tensor) -> None:
        """Add a chunk of the tensor `key` of global `shape`, whose first entry lies at `offset`."""
        if key not in self._tensors:
            properties = TensorProperties(dtype=values.dtype)
            self._tensors[key] = TensorStorageMetadata(properties, torch.Size(shape), [])
        known = self._tensors[key]
        assert known.size == torch.Size(shape) and known.properties.dtype == values.dtype, key
        at = torch.Size(offset)
        known.chunks.append(ChunkStorageMetadata(at, values.shape))
        self._storage[MetadataIndex(key, at)] = self._store(values.contiguous().clone())

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""
        self._objects[key] = BytesStorageMetadata()
        self._storage[MetadataIndex(key)] = self._store(value)

    def written(self) -> Written:
        """Close this writer's files and tell what is in them."""
        self._close()
        return Written(self._tensors, self._objects, self._storage, self.bytes_written)

    def absorb(self, other: Written) -> None:
        """Take in what another writer has put into the same directory."""
        for key, tensor in other.tensors.items():
            known = self._tensors.setdefault(key, TensorStorageMetadata(tensor.properties, tensor.size, []))
            assert known.size == tensor.size and known.properties == tensor.properties, key
            known.chunks.extend(tensor.chunks)
        self._objects.update(other.objects)
        self._storage.update(other.storage)
        self.bytes_written += other.bytes

    def finish(self, common: dict[str, Any]) -> None:
        """Write what is not sharded and the index, and last the file that makes it a checkpoint."""
        self._close()
        archive = io.BytesIO()  # written as bytes: torch.save to a path hides a full disk in a RuntimeError
        torch.save(common, archive)
        (self.path / "common.pt").write_bytes(archive.getbuffer())
        metadata = Metadata({**self._tensors, **self._objects}, planner_data=None, storage_data=self._storage)
        with open(self.path / ".metadata", "wb") as stream:
            pickle.dump(metadata, stream)
        (self.path / "metadata.json").write_text(json.dumps(FORMAT))

    def _store(self, value: Any) -> _StorageInfo:
        archive = io.BytesIO()
        torch.save(value, archive)
        stream = self._open()
        offset, length = stream.tell(), archive.tell()
        stream.write(archive.getbuffer())
        self.bytes_written += length
        info = _StorageInfo(Path(stream.name).name, offset, length)
        if offset + length > MAX_FILE_BYTES:
            self._close()
        return info

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self._stream = open(self.path / f"__{self._part}_{self._files}.distcp", "wb")
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
    for name in ("metadata.json", ".metadata", "common.pt"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: {name} is missing")
    try:
        found = json.loads((path / "metadata.json").read_text())
        backend, version = found["sharded_backend"], found["sharded_backend_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'metadata.json'}: damaged: {type(error).__name__}: {error}") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(f"{path}: format {backend} version {version}; only torch_dist version 1 is read")


def _index(metadata: Any) -> tuple[dict[str, TensorInfo], dict[str, Chunk]]:
    tensors: dict[str, TensorInfo] = {}
    objects: dict[str, Chunk] = {}
    for key, item in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a key is {key!r}")
        if isinstance(item, TensorStorageMetadata):
            if not isinstance(dtype := item.properties.dtype, torch.dtype):
                raise TypeError(f"{key}: its dtype is {dtype!r}")
            chunks = tuple(_chunk(metadata, key, chunk, dtype.itemsize) for chunk in item.chunks)
            tensors[key] = TensorInfo(_numbers(item.size), dtype, chunks)
        else:
            objects[key] = _placed((), metadata.storage_data[MetadataIndex(key)])
    return tensors, objects


def _chunk(metadata: Any, key: str, chunk: ChunkStorageMetadata, itemsize: int) -> Chunk:
    starts, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
    box = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
    placed = _placed(box, metadata.storage_data[MetadataIndex(key, chunk.offsets)])
    if math.prod(sizes) * itemsize > placed.length:  # so no more memory is asked for than there is on disk
        raise ValueError(f"{key}: a chunk of {sizes} cannot lie in {placed.length} bytes")
    return placed


def _placed(box: Box, where: _StorageInfo) -> Chunk:
    offset, length = _numbers((where.offset, where.length))
    if not isinstance(where.relative_path, str):
        raise TypeError(f"a file name is {where.relative_path!r}")
    return Chunk(box, where.relative_path, offset, length)


def _numbers(values: Iterable[int]) -> tuple[int, ...]:
    """Values as they must be in an index: whole and not negative."""
    numbers = tuple(values)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError(f"{numbers} are no sizes")
    return numbers


def _check_cover(where: str, info: TensorInfo) -> None:
    """Raise CheckpointError unless the chunks cover a tensor exactly once.

    They do if they lie inside, hold as many values as it has, and no two of them meet. Sorted by their first
    dimension only a few at a time can meet.
    """
    wanted = math.prod(info.shape)
    for chunk in info.chunks:
        if len(chunk.box) != len(info.shape) or any(
            b > size for (_, b), size in zip(chunk.box, info.shape, strict=True)
        ):
            raise CheckpointError(f"{where}: chunk {_text(chunk.box)} lies outside {info.shape}")
    held = sum(math.prod(b - a for a, b in chunk.box) for chunk in info.chunks)
    if held != wanted:
        raise CheckpointError(f"{where}: its chunks hold {held} of {wanted} values")
    near: list[Box] = []
    for box in sorted(chunk.box for chunk in info.chunks):
        near = [other for other in near if not box or other[0][1] > box[0][0]]
        for other in near:
            if _intersect(box, other):
                raise CheckpointError(f"{where}: chunks {_text(other)} and {_text(box)} overlap")
        near.append(box)


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def _intersect(one: Box, other: Box) -> Box | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(a < b for a, b in common) else None
