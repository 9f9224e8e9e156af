"""A torch_dist checkpoint planned to the byte: the position of every chunk's archive is known before any is written.

So the index can be written without reports from the workers, workers exchange no messages, and a file that was being
written when its worker died is simply written again, to the same bytes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.checkpoint.index import Box, DType, Source, bytes_of, intersect, sizes
from megagrow.checkpoint.pickles import zip_format, zip_writer
from megagrow.checkpoint.tensors import OPTIMIZER_STATES, extra_state_keys, optimizer_key
from megagrow.convert.make import PIECE_VALUES, Piece, maker_of
from megagrow.convert.plan import ConversionPlan, TaskPart, chunks, reading_rank, units
from megagrow.convert.targets.finite import FiniteCheck
from megagrow.convert.targets.protocol import OutputFile

OBJECTS = "__0_objects.distcp"
_frame = lru_cache(maxsize=4096)(zip_writer.tensor_frame)


@dataclass(frozen=True)
class PlacedChunk:
    """A chunk and its position: an archive of `length` bytes at `offset` of the unit's file number `file`."""

    key: str
    box: Box
    dtype: DType
    unit: int
    file: int
    offset: int
    length: int

    @property
    def frame(self) -> zip_writer.TensorFrame:
        """The bytes of the archive before and after the values."""
        return _frame(self.dtype, sizes(self.box), self.offset % zip_format.ALIGNMENT)


@dataclass(frozen=True, eq=False)
class PlannedUnit:
    """A unit's parts, its files and the chunks in them."""

    parts: tuple[TaskPart, ...]
    files: tuple[OutputFile, ...]
    chunks: tuple[PlacedChunk, ...]


class TorchDistTarget:
    """The data files of a conversion's target, and its index.

    Attributes:
        conversion: the plan of the conversion.
        notes: none.
        finite: looks at all values that are produced.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        conversion: ConversionPlan,
        source: Source | None,
        piece_values: int = PIECE_VALUES,
        finite: FiniteCheck | None = None,
    ) -> None:
        """Plan all files. Without a source nothing can be produced, but sizes and positions are known."""
        self.finite = finite or FiniteCheck()
        self.conversion = conversion
        self._maker = None if source is None else maker_of(conversion, source, piece_values)
        self._plans = tuple(self._plan(number, parts) for number, parts in enumerate(units(conversion)))
        self._shapes: dict[str, tuple[tuple[int, ...], DType]] = {}
        for task in conversion.tasks:
            shape = task.kind.global_shape(conversion.step.large)
            for key, dtype in self._states(task.kind.key):
                self._shapes[key] = (shape, dtype)

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit."""
        return tuple(plan.files for plan in self._plans)

    @property
    def chunks(self) -> Iterator[PlacedChunk]:
        """All chunks of the target."""
        return (chunk for plan in self._plans for chunk in plan.chunks)

    def file(self, chunk: PlacedChunk) -> OutputFile:
        """The file that contains a chunk."""
        return self._plans[chunk.unit].files[chunk.file]

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (file of the unit, its next bytes)."""
        plan = self._plans[unit]
        assert self._maker is not None, "planned without a source"
        cursor = _Cursor(plan.chunks)
        for part in plan.parts:
            for piece in self._maker.pieces(part.task, part.box):
                self.finite.look(piece.key, piece.corner, piece.values, piece.dtype)
                yield from cursor.put(piece)
        assert cursor.done, "a unit's pieces do not fill its chunks"

    def finish(self, staging: Path, common: Mapping[str, Any], states: Mapping[str, bytes] | None = None) -> None:
        """Write the objects, the unsharded state, and the index of the data files.

        Args:
            staging: the directory with the data files.
            common: the unsharded state.
            states: archives of the `_extra_state` objects that are not empty, by key.
        """
        from megagrow.checkpoint.formats.torch_dist import ChunkEntry, write_index

        entries = [
            ChunkEntry(
                chunk.key,
                tuple(start for start, _ in chunk.box),
                sizes(chunk.box),
                (self.file(chunk).name, chunk.offset, chunk.length),
            )
            for chunk in self.chunks
        ]
        nothing = zip_writer.save_small([None])  # one archive serves all objects that are empty
        objects = {key: (OBJECTS, 0, len(nothing)) for key in extra_state_keys(self.conversion.step.large)}
        end = len(nothing)
        for key, archive in (states or {}).items():
            objects[key] = (OBJECTS, end, len(archive))
            end += len(archive)
        (staging / OBJECTS).write_bytes(b"".join((nothing, *(states or {}).values())))
        write_index(staging, self._shapes, entries, objects, common)

    def _plan(self, number: int, parts: tuple[TaskPart, ...]) -> PlannedUnit:
        shape, layout = self.conversion.step.large, self.conversion.layout
        files: dict[tuple[int, int], int] = {}
        ends: list[int] = []
        placed: list[PlacedChunk] = []
        for part in parts:
            kind, layer = part.task.kind, part.task.layer
            front: Box = () if layer is None else ((layer, layer + 1),)
            cut = [
                ((*front, *box), reading_rank(part.task, shape, layout, tensor, expert))
                for box, tensor, expert in chunks(kind, shape, layout, part.box)
            ]
            for stream, (key, dtype) in enumerate(self._states(kind.key)):
                for box, reader in cut:
                    file = files.setdefault((reader, min(stream, 1)), len(files))
                    if file == len(ends):
                        ends.append(0)
                    frame = _frame(dtype, sizes(box), ends[file] % zip_format.ALIGNMENT)
                    size = math.prod(sizes(box)) * dtype.itemsize
                    length = len(frame.head) + size + len(frame.tail)
                    placed.append(PlacedChunk(key, box, dtype, number, file, ends[file], length))
                    ends[file] += length
        names = [f"__{reader}_{2 * number + stream}.distcp" for reader, stream in files]
        return PlannedUnit(parts, tuple(map(OutputFile, names, ends)), tuple(placed))

    def _states(self, key: str) -> list[tuple[str, DType]]:
        """Keys and types of a tensor's states: the model's weights, then the optimizer states."""
        states = OPTIMIZER_STATES if self.conversion.optimizer else ()
        return [
            (key, self.conversion.weight_dtype_of(key)),
            *((optimizer_key(state, key), self.conversion.state_dtype) for state in states),
        ]


class _Cursor:
    """Tracks how far each chunk of a unit is filled. Pieces must come in row-major order, tensor by tensor."""

    def __init__(self, placed: tuple[PlacedChunk, ...]) -> None:
        self._open: dict[str, list[tuple[PlacedChunk, int]]] = {}
        for chunk in placed:
            self._open.setdefault(chunk.key, []).append((chunk, 0))

    @property
    def done(self) -> bool:
        """Whether all chunks are filled."""
        return not any(self._open.values())

    def put(self, piece: Piece) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield a piece's values, cut along its chunks, with the archive bytes that precede and follow them."""
        box = tuple((start, start + size) for start, size in zip(piece.corner, piece.values.shape, strict=True))
        waiting = self._open[piece.key]
        left = math.prod(sizes(box))
        index = 0
        while left:
            chunk, filled = waiting[index]
            common = intersect(chunk.box, box)
            if common is None:
                index += 1
                continue
            inside = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            values = np.ascontiguousarray(piece.values[inside])
            if not filled:
                yield chunk.file, chunk.frame.head
            yield chunk.file, bytes_of(values)
            left -= values.size
            filled += values.size
            if filled == math.prod(sizes(chunk.box)):
                yield chunk.file, chunk.frame.tail
                waiting.pop(index)
            else:
                waiting[index] = (chunk, filled)
                index += 1
