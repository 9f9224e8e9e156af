"""Slices of chunks out of files: by position, straight into the result where they lie in one run, never whole.

A read asks for a box; each chunk that meets it gives its part. Where the part lies in the file without gaps and in
the order of the result, the kernel writes it there itself. Otherwise runs of at most `BLOCK` bytes pass through one
buffer: gaps between rows are read along where they are small, and skipped where they are not. Nothing is mapped, so
what a conversion holds in memory is what it has asked for.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
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
    volume,
    whole,
)
from megagrow.checkpoint.pickles import load_archive, zip_reader
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
from megagrow.checkpoint.reading.files import Files, outside
from megagrow.checkpoint.reading.strided import StridedRead, copy_in_strips, interleaved, narrow, row_width

BLOCK = 4 << 20
"""Bytes of the buffer through which scattered values pass."""
_WASTE = 4
"""Up to so many times the wanted bytes are read in one run, gaps included."""
_ALONG = 32 << 10
"""Up to so many bytes are read along: asking for another run takes as long as reading more than these (48 us here)."""
_MANY = 16
"""Chunks of a tensor from which on they are looked up by layer."""


class ChunkReader:
    """Reads slices of tensors whose index is known: what stores of files have in common.

    Attributes:
        path: the directory.
        tensors: index by canonical key.
        objects: small pickled objects by key.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], objects: Mapping[str, Chunk]) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.objects = dict(objects)
        self._files = Files(path)
        self._payloads: dict[tuple[str, int], zip_reader.Payload] = {}
        self._by_layer: dict[str, dict[int, list[Chunk]]] = {}
        self._buffer = np.empty(0, np.uint8)

    def read(self, key: str, box: Box) -> "Tensor":
        """Return the values of a box of a tensor; CheckpointError if a part is missing or damaged."""
        raw = self.raw(key, box)
        return tensor_of(raw, self.tensors[key].dtype)

    def raw(self, key: str, box: Box) -> Raw:
        """Return them as integers of their size; CheckpointError if a part is missing or damaged."""
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor {key}")
        result, covered = np.empty(sizes(box), info.dtype.raw), 0
        near = self._near(key, box)
        parts = [(chunk, common) for chunk in near if (common := intersect(chunk.box, box)) is not None]
        strided: list[StridedRead] = []
        for chunk, common in parts:
            into: tuple[Any, ...] = tuple(
                slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True)
            )
            strided.append(self._part(result[(*into, ...)], chunk, common, key, info.dtype))
            covered += volume(common)
        strided.sort(key=lambda part: (part.path, part.offset))
        for together in [strided] if len(strided) == 1 else interleaved(strided):
            self._fill(together)
        if covered != result.size:
            raise CheckpointError(
                f"{self.path}: {key}: its chunks hold {covered} of {result.size} values of {list(box)}"
            )
        return result

    def read_whole(self, key: str) -> "Tensor":
        """Return a whole tensor."""
        return self.read(key, whole(self.tensors[key].shape))

    def read_object(self, key: str) -> Any:
        """Return a small object; CheckpointError if it is damaged or would import something foreign."""
        chunk = self.objects[key]
        content = bytearray(chunk.length)
        self._files.read(chunk.path, chunk.offset, memoryview(content))
        return load_archive(bytes(content), f"{self.path / chunk.path}: {key}")

    def forget(self, key: str, box: Box) -> None:
        """Let the pages of a box leave the kernel's cache."""
        info = self.tensors[key]
        for chunk in self._near(key, box):
            if (common := intersect(chunk.box, box)) is not None:
                offset, strides = self._place(chunk, key, info.dtype)
                ends = zip(common, chunk.box, strides, strict=True)
                first, last = 0, 0
                for (a, b), (start, _), stride in ends:
                    first, last = first + (a - start) * stride, last + (b - 1 - start) * stride
                length = (last - first + 1) * info.dtype.itemsize
                self._files.forget(chunk.path, offset + first * info.dtype.itemsize, length)

    def check_extents(self) -> None:
        """Raise CheckpointError where the index points outside its directory or past the end of a file."""
        ends: dict[str, int] = {}
        for chunk in self._chunks():
            ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.offset + chunk.length)
        for name, end in ends.items():
            file = self.path / name
            if outside(name):  # before anything is asked of the file system
                raise CheckpointError(f"{self.path}: refused: points outside its directory: {name}")
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size < end:
                raise CheckpointError(f"{file}: cut short: {file.stat().st_size} bytes, its index needs {end}")

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _near(self, key: str, box: Box) -> Sequence[Chunk]:
        """The chunks of a tensor that a box may meet: of a stacked tensor only those of one layer are looked at."""
        chunks = self.tensors[key].chunks
        if len(chunks) < _MANY or box[0][1] - box[0][0] != 1:
            return chunks
        if key not in self._by_layer:
            layers: dict[int, list[Chunk]] = {}
            for chunk in chunks:
                for layer in range(*chunk.box[0]) if chunk.box[0][1] - chunk.box[0][0] < _MANY else (-1,):
                    layers.setdefault(layer, []).append(chunk)
            self._by_layer[key] = {} if -1 in layers else layers
        layers = self._by_layer[key]
        return layers.get(box[0][0], ()) if layers else chunks

    def _chunks(self) -> Iterable[Chunk]:
        for info in self.tensors.values():
            yield from info.chunks
        yield from self.objects.values()

    def _part(self, view: Raw, chunk: Chunk, common: Box, key: str, dtype: DType) -> "StridedRead":
        """Where the part `common` of a chunk lies, and the view of the result that it belongs into."""
        offset, strides = self._place(chunk, key, dtype)
        skip = sum((a - start) * stride for (a, _), (start, _), stride in zip(common, chunk.box, strides, strict=True))
        return StridedRead(view, chunk.path, offset + skip * dtype.itemsize, strides)

    def _fill(self, parts: "Sequence[StridedRead]") -> None:
        """Read parts that lie between each other: row by row of the file for all of them, or each for itself."""
        if len(parts) == 1 or not (at_once := self._rows_at_once(parts)):
            for part in parts:
                self._scatter(part.view, part.path, part.offset, part.strides)
            return
        (count, stride), size, width = parts[0].row, parts[0].view.itemsize, row_width(parts)
        for first in range(0, count, at_once):
            rows = min(at_once, count - first)
            length = (rows - 1) * stride + width
            self._files.read(
                parts[0].path, parts[0].offset + first * stride * size, memoryview(self._block(length * size))
            )
            for part in parts:
                into = narrow(part.view, part.dim, first, rows)
                copy_in_strips(into, self._strided(into, part.strides, part.offset - parts[0].offset))

    @staticmethod
    def _rows_at_once(parts: "Sequence[StridedRead]") -> int:
        """How many rows of the file one read may take for all of some parts; 0 where each is read for itself."""
        (count, stride), size, width = parts[0].row, parts[0].view.itemsize, row_width(parts)
        alike = all(part.row == (count, stride) and part.inner <= stride for part in parts)
        if not alike or width > stride or stride * size > _ALONG * len(parts):
            return 0
        return max(0, (BLOCK // size - width) // stride + 1)

    def _place(self, chunk: Chunk, key: str, dtype: DType) -> tuple[int, tuple[int, ...]]:
        """Byte of a chunk's first value in its file, and its strides; what an archive says of itself is checked."""
        expected = sizes(chunk.box)
        if not chunk.archive:
            strides = chunk.strides or row_major(expected)
            self._check_inside(chunk, expected, strides, chunk.length, dtype, key)
            return chunk.offset + chunk.start * dtype.itemsize, strides
        where = f"{self.path / chunk.path}: {key}"
        found = self._payloads.get((chunk.path, chunk.offset))
        if found is None:
            found = zip_reader.locate(self._files.handle(chunk.path), chunk.offset, chunk.length, where)
            self._payloads[chunk.path, chunk.offset] = found
        if found.dtype != dtype:
            raise CheckpointError(f"{where}: holds {found.shape} {found.dtype}, not {expected} {dtype}")
        if chunk.strides is None and not chunk.start:
            long = [(n, stride) for n, stride in zip(found.shape, found.strides, strict=True) if n != 1]
            if [n for n, _ in long] != [n for n in expected if n != 1]:
                raise CheckpointError(f"{where}: holds {found.shape} {found.dtype}, not {expected} {dtype}")
            rest = iter([stride for _, stride in long])
            return found.offset, tuple(1 if n == 1 else next(rest) for n in expected)
        if found.strides != row_major(found.shape):
            raise CheckpointError(f"{where}: its values do not lie row by row, which is needed of a packed tensor")
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
        last = chunk.start + sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
        if 0 not in lengths and (last + 1) * dtype.itemsize > length:
            raise CheckpointError(
                f"{self.path / chunk.path}: {key}: {list(lengths)} values of {dtype} do not lie in {length} bytes"
            )

    def _scatter(self, result: Raw, name: str, offset: int, strides: tuple[int, ...]) -> None:
        """Fill a view from values that lie at `offset` with `strides`, in runs."""
        itemsize, lengths, count = result.itemsize, result.shape, result.size
        if not count:
            return
        span = 1 + sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True))
        own = row_major(tuple(lengths))
        in_order = all(n == 1 or a == b for n, a, b in zip(lengths, strides, own, strict=True))
        if in_order and result.flags.c_contiguous:
            self._files.read(name, offset, bytes_of(result))
        elif span * itemsize <= BLOCK and span <= _WASTE * count:
            self._files.read(name, offset, memoryview(self._block(span * itemsize)))
            copy_in_strips(result, self._strided(result, strides, 0))
        else:
            self._split(result, name, offset, strides, span)

    def _split(self, result: Raw, name: str, offset: int, strides: tuple[int, ...], span: int) -> None:
        """Fill a view that no single run can fill: some entries of its longest stride at a time."""
        itemsize = result.itemsize
        dim = max((d for d in range(result.ndim) if result.shape[d] > 1), key=lambda d: strides[d])
        inner = span - (result.shape[dim] - 1) * strides[dim]  # values that one entry spans
        wasteful = span > _WASTE * result.size
        at_once = 1 if wasteful else max(1, (BLOCK // itemsize - inner) // strides[dim] + 1)
        for start in range(0, result.shape[dim], at_once):
            part = narrow(result, dim, start, min(at_once, result.shape[dim] - start))
            self._scatter(part, name, offset + start * strides[dim] * itemsize, strides)

    def _block(self, size: int) -> Any:
        if self._buffer.size < size:
            self._buffer = np.empty(BLOCK, np.uint8)
        return self._buffer[:size]

    def _strided(self, like: Raw, strides: tuple[int, ...], offset: int) -> Raw:
        """Values of the buffer from a byte on, with strides in values."""
        steps = tuple(stride * like.itemsize for stride in strides)
        return np.ndarray(like.shape, like.dtype, self._buffer.data, offset, steps)
