"""Reads slices of tensors out of files, by position; a file is never read whole.

A read asks for a box, and every chunk that meets it gives its part. `strided.plan_reads` decides which bytes to read;
this module locates the chunks' values and does the reads. No file is mapped, so a conversion keeps in memory only what
it has requested, plus one buffer.
"""

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megagrow.checkpoint.index import (
    Box,
    Chunk,
    DType,
    Raw,
    TensorInfo,
    bytes_of,
    intersect,
    row_major,
    sizes,
    tensor_of,
    whole_box,
    widened,
)
from megagrow.checkpoint.pickles import load_object, zip_reader
from megagrow.checkpoint.reading.files import Files
from megagrow.checkpoint.reading.strided import (
    BufferedRead,
    DirectRead,
    ReadPolicy,
    StridedBox,
    chunks_by_layer,
    plan_reads,
    strided_box,
)
from megagrow.errors import CheckpointError
from megagrow.files.bounded import is_plain_name

if TYPE_CHECKING:
    from torch import Tensor
_MANY = 16
"""A tensor with this many chunks or more has them looked up by layer."""
_STRIP = 32
"""Columns of a transposed copy at a time: a quarter of the time of all at once (5 ms for 2 M values here)."""


class ChunkReader:
    """Reads slices of tensors whose index is known; the readers of all formats build on it.

    Attributes:
        path: the directory.
        tensors: index by canonical key.
        objects: small pickled objects by key.
        checksums: whether blocks are compared with their checksums, where the directory has any.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        objects: Mapping[str, Chunk],
        *,
        checksums: bool = True,
    ) -> None:
        self.path = path
        self.checksums = checksums
        self.tensors = dict(tensors)
        self.objects = dict(objects)
        self._files = Files(path, checksums=checksums)
        self._payloads: dict[tuple[str, int], zip_reader.ArchivedValues] = {}
        self._by_layer: dict[str, Mapping[int, Sequence[Chunk]]] = {}
        self._policy = ReadPolicy()
        self._buffer = np.empty(0, np.uint8)

    def read(self, key: str, box: Box) -> "Tensor":
        """Return the values of a box of a tensor; CheckpointError if a part is missing or damaged."""
        raw = self.raw(key, box)
        return tensor_of(raw, self.tensors[key].dtype)

    def raw(self, key: str, box: Box) -> Raw:
        """Like `read`, but returns the raw bit patterns as integers, without torch."""
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor {key}")
        if any(chunk.dtype is not None for chunk in self._candidates(key, box)):
            return self._raw_of_several_types(key, box, info)
        result = np.empty(sizes(box), info.dtype.raw)
        parts = list(self._strided_boxes(key, box))
        if (covered := sum(math.prod(part.lengths) for part in parts)) != result.size:
            raise CheckpointError(
                f"{self.path}: {key}: its chunks hold {covered} of {result.size} values of {list(box)}"
            )
        self._fill(result, parts)
        return result

    def _raw_of_several_types(self, key: str, box: Box, info: TensorInfo) -> Raw:
        """Return a box of a tensor whose chunks have several types, in the widest of them."""
        result, covered = np.empty(sizes(box), info.dtype.raw), 0
        for chunk in self._candidates(key, box):
            if (common := intersect(chunk.box, box)) is None:
                continue
            dtype = chunk.dtype or info.dtype
            offset, strides = self._locate(chunk, key, dtype)
            values = np.empty(sizes(common), dtype.raw)
            self._fill(values, [strided_box(chunk, common, common, offset, strides, dtype.itemsize)])
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            result[into] = widened(values, dtype, info.dtype)
            covered += values.size
        if covered != result.size:
            raise CheckpointError(
                f"{self.path}: {key}: its chunks hold {covered} of {result.size} values of {list(box)}"
            )
        return result

    def _fill(self, result: Raw, parts: list[StridedBox]) -> None:
        """Read the parts that make up a result."""
        result_bytes = bytes_of(result)
        for read in plan_reads(parts, result.shape, result.itemsize, self._policy):
            if isinstance(read, DirectRead):
                self._files.read(read.path, read.offset, result_bytes[read.into : read.into + read.length])
            else:
                self._read_through_buffer(read, result)

    def read_whole(self, key: str) -> "Tensor":
        """Return a whole tensor."""
        return self.read(key, whole_box(self.tensors[key].shape))

    def read_object(self, key: str) -> Any:
        """Return a small object; CheckpointError if it is damaged or would import a name that is not allowed."""
        chunk = self.objects[key]
        handle = self._files.handle(chunk.path)
        return load_object(handle, chunk.offset, chunk.length, f"{self.path / chunk.path}: {key}")

    def forget(self, key: str, box: Box) -> None:
        """Drop the pages of a box from the kernel's cache."""
        for part in self._strided_boxes(key, box):
            self._files.forget(part.path, part.offset, part.span * self.tensors[key].dtype.itemsize)

    def check_extents(self) -> None:
        """Raise CheckpointError where the index points outside its directory or past the end of a file."""
        ends: dict[str, int] = {}
        for chunk in self._chunks():
            ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.offset + chunk.length)
        for name, end in ends.items():
            if not is_plain_name(name, parts=True):  # checked first, so that no file outside is even looked up
                raise CheckpointError(
                    f"{self.path}: refused: points outside its directory, or is no file name: {reprlib.repr(name)}"
                )
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size < end:
                raise CheckpointError(f"{file}: cut short: {file.stat().st_size} bytes, its index needs {end}")

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def _strided_boxes(self, key: str, box: Box) -> Iterator[StridedBox]:
        """Yield the part of every chunk that overlaps a box, with the location of its values."""
        for chunk in self._candidates(key, box):
            if (common := intersect(chunk.box, box)) is not None:
                dtype = chunk.dtype or self.tensors[key].dtype
                offset, strides = self._locate(chunk, key, dtype)
                yield strided_box(chunk, common, box, offset, strides, dtype.itemsize)

    def _candidates(self, key: str, box: Box) -> Sequence[Chunk]:
        """The chunks of a tensor that may overlap a box: for a box in one layer, only that layer's."""
        chunks = self.tensors[key].chunks
        if len(chunks) < _MANY or box[0][1] - box[0][0] != 1:
            return chunks
        if key not in self._by_layer:
            self._by_layer[key] = chunks_by_layer(chunks, _MANY)
        layers = self._by_layer[key]
        return layers.get(box[0][0], ()) if layers else chunks

    def _chunks(self) -> Iterable[Chunk]:
        for info in self.tensors.values():
            yield from info.chunks
        yield from self.objects.values()

    def _locate(self, chunk: Chunk, key: str, dtype: DType) -> tuple[int, tuple[int, ...]]:
        """Byte of a chunk's first value in its file, and its strides; an archive must agree with the index."""
        expected = sizes(chunk.box)
        if not chunk.archive:
            strides = chunk.strides or row_major(expected)
            self._check_inside(chunk, expected, strides, chunk.length, dtype, key)
            return chunk.offset + chunk.start * dtype.itemsize, strides
        where = f"{self.path / chunk.path}: {key}"
        found = self._payloads.get((chunk.path, chunk.offset))
        if found is None:
            found = zip_reader.locate_tensor(self._files.source(chunk.path), chunk.offset, chunk.length, where)
            self._payloads[chunk.path, chunk.offset] = found
        if found.dtype != dtype:
            raise CheckpointError(f"{where}: contains {found.shape} {found.dtype}, not {expected} {dtype}")
        if chunk.strides is None and not chunk.start:
            long = [(n, stride) for n, stride in zip(found.shape, found.strides, strict=True) if n != 1]
            if [n for n, _ in long] != [n for n in expected if n != 1]:
                raise CheckpointError(f"{where}: contains {found.shape} {found.dtype}, not {expected} {dtype}")
            rest = iter([stride for _, stride in long])
            return found.offset, tuple(1 if n == 1 else next(rest) for n in expected)
        if found.strides != row_major(found.shape):
            raise CheckpointError(f"{where}: its values are not stored row by row, which a packed tensor requires")
        strides = chunk.strides or row_major(expected)
        self._check_inside(chunk, expected, strides, math.prod(found.shape) * dtype.itemsize, dtype, key)
        return found.offset + chunk.start * dtype.itemsize, strides

    def _check_inside(
        self,
        chunk: Chunk,
        lengths: tuple[int, ...],
        strides: tuple[int, ...],
        length: int,
        dtype: DType,
        key: str,
    ) -> None:
        """Raise CheckpointError where a chunk's strides lead past the end of its `length` bytes."""
        last = chunk.start + sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
        if 0 not in lengths and (last + 1) * dtype.itemsize > length:
            raise CheckpointError(
                f"{self.path / chunk.path}: {key}: {list(lengths)} values of {dtype} do not fit into {length} bytes"
            )

    def _read_through_buffer(self, read: BufferedRead, result: Raw) -> None:
        """Read into the buffer, and copy its boxes into the result."""
        if self._buffer.size < read.length:
            self._buffer = np.empty(max(read.length, self._policy.block), np.uint8)
        self._files.read(read.path, read.offset, self._buffer.data[: read.length])
        for box in read.boxes:
            strides = [stride * result.itemsize for stride in box.strides]
            values: Raw = np.ndarray(box.lengths, result.dtype, self._buffer.data, box.offset - read.offset, strides)
            _copy_in_strips(result[box.region], values)


def _copy_in_strips(into: Raw, values: Raw) -> None:
    """Copy; a transposed copy goes strip by strip, so that both sides stay in the caches."""
    if into.ndim < 2 or into.shape[-1] <= _STRIP or values.strides[-1] <= values.strides[-2]:
        into[...] = values
        return
    for start in range(0, into.shape[-1], _STRIP):
        into[..., start : start + _STRIP] = values[..., start : start + _STRIP]
