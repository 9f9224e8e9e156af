"""Any checkpoint as a Hugging Face directory: safetensors files planned to the byte, then made piece by piece.

Shapes say how long every file is and where each tensor begins in it, so headers are written before any value is read.
Values are read as boxes of Megatron's tensors, laid into a piece of a Hugging Face tensor, and given out; no more is in
memory than one piece and what it was read from.
"""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.checkpoint.formats.huggingface import (
    CONFIG,
    INDEX,
    SAFETENSORS_DTYPES,
    WEIGHTS,
    BoxPair,
    box_pairs,
    choose,
    compose,
    tensor_shapes,
    write_header,
)
from megagrow.checkpoint.index import Box, DType, Raw, Source, bytes_of, intersect, raw_of, sizes, tensor_of, whole
from megagrow.checkpoint.tensors import kinds
from megagrow.config import ModelShape
from megagrow.convert.targets.production import OutputFile
from megagrow.errors import CheckpointError

SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 16 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
GENERATION_FILE = "generation_config.json"


class HuggingFaceTarget:
    """The production of a Hugging Face directory from any source; a unit is one file of weights.

    Attributes:
        architecture: by its model_type.
        config: what config.json will say.
        units: the files of weights; one of a single shard has no number, as transformers has it.
        notes: what a person should know.
    """

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        dtype: DType | None = None,
        *,
        remembered: Mapping[str, Any] | None = None,
        tokenizer: Path | None = None,
        shard_bytes: int = SHARD_BYTES,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Plan all files.

        Args:
            source: canonical tensors; its model weights are exported, not the masters.
            shape: of the model; rows of its vocabulary's padding are left out.
            dtype: of the files: float32, bfloat16 or float16; None: each tensor's own.
            remembered: what `open_huggingface` left in `common["huggingface"]`: architecture, config.json and the
                directory whose tokenizer and generation files are copied.
            tokenizer: a tokenizer's file, or a directory with its files, to be copied instead.
            shard_bytes: of values in a file; a larger tensor has a file of its own.
            piece_bytes: of values given out at a time.

        Raises:
            CheckpointError: no architecture can express the shape, or the source does not hold its tensors.
        """
        remembered = remembered or {}
        self._source, self._piece_bytes = source, piece_bytes
        self._directory = Path(remembered["directory"]) if "directory" in remembered else None
        self._tokenizer = tokenizer
        chosen = choose(shape, remembered.get("model_type"))
        self.architecture = chosen.model_type
        placed = tuple(box_pairs(chosen.variants[0], shape))
        _check_source(source, shape)
        self._parts: dict[str, list[BoxPair]] = defaultdict(list)
        for part in placed:
            self._parts[part.name].append(part)
        self._shapes = tensor_shapes(placed)
        self._dtypes = {part.name: dtype or source.tensors[part.key].dtype for part in placed}
        for name, found in self._dtypes.items():
            if found not in SAFETENSORS_DTYPES.values():
                raise CheckpointError(f"{name} is {found}: say a dtype for the export: float32, bfloat16 or float16")
        named = str(self._dtypes[placed[0].name])
        self.config = compose(shape, chosen, remembered.get("config"), named)
        self._shards = self._cut(shard_bytes)
        self._headers = [
            write_header((name, self._dtypes[name], self._shapes[name]) for name in shard) for shard in self._shards
        ]
        self.notes = tuple(self._say(remembered.get("model_type")))

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit: one."""
        return tuple(
            (OutputFile(self._file(index), len(self._headers[index]) + sum(map(self._bytes, shard))),)
            for index, shard in enumerate(self._shards)
        )

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (0, the next bytes of the unit's one file): its header, then tensor after tensor."""
        yield 0, self._headers[unit]
        for name in self._shards[unit]:
            for box in _boxes(self._shapes[name], max(1, self._piece_bytes // self._dtypes[name].itemsize)):
                yield 0, bytes_of(self._piece(name, box))
            for part in self._parts[name]:
                self._source.forget(part.key, part.box)

    def finish(self, directory: Path) -> None:
        """Write the small files into the directory that holds the files of weights."""
        if len(self._shards) > 1:
            listed = {name: self._file(index) for index, shard in enumerate(self._shards) for name in shard}
            total = sum(map(self._bytes, self._shapes))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (directory / CONFIG).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        for file, name in self._copied():
            shutil.copyfile(file, directory / name)

    def _piece(self, name: str, box: Box) -> Raw:
        """Values of a box of a Hugging Face tensor."""
        piece = np.empty(sizes(box), self._dtypes[name].raw)
        for part in self._parts[name]:
            common = intersect(part.place, box)
            if common is None:
                continue
            inner = tuple((a - start, b - start) for (a, b), (start, _) in zip(common, part.place, strict=True))
            inner = inner[::-1] if part.transposed else inner
            lead = len(part.box) - len(inner)
            place = zip(part.box[lead:], inner, strict=True)
            wanted = (*part.box[:lead], *((start + a, start + b) for (start, _), (a, b) in place))
            values = self._values(name, part.key, wanted).reshape(sizes(inner))
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            piece[into] = values.T if part.transposed else values
        return piece

    def _values(self, name: str, key: str, box: Box) -> Raw:
        """Values of Megatron's tensor in the type of a Hugging Face tensor: by torch where they must be cast."""
        here, there = self._source.tensors[key].dtype, self._dtypes[name]
        raw = self._source.raw(key, box)
        if here == there:
            return raw
        values = tensor_of(raw, here)
        cast = values.to(there.torch)
        if there is DType.FLOAT16 and not cast.isfinite().all() and values.isfinite().all():
            raise CheckpointError(f"{name}: values beyond float16's range: export in bfloat16 or float32")
        return raw_of(cast)

    def _cut(self, shard_bytes: int) -> list[list[str]]:
        """Tensors by file, in order; within a file the wider types come first, so that every value is aligned."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name in self._shapes:
            if shards[-1] and filled + self._bytes(name) > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self._bytes(name)
        return [sorted(shard, key=lambda name: -self._dtypes[name].itemsize) for shard in shards]

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtypes[name].itemsize

    def _file(self, index: int) -> str:
        count = len(self._shards)
        return WEIGHTS if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _copied(self) -> list[tuple[Path, str]]:
        """Files to copy, and their names in the target."""
        found: list[tuple[Path, str]] = []
        tokenizer, origin = self._tokenizer or self._directory, self._directory
        if tokenizer is not None and tokenizer.is_file():
            name = "tokenizer.model" if tokenizer.suffix == ".model" else "tokenizer.json"
            settings = "tokenizer_config.json"
            found += [(tokenizer, name), (tokenizer.with_name(settings), settings)]
        elif tokenizer is not None:
            found += [(tokenizer / name, name) for name in TOKENIZER_FILES]
        if origin is not None:
            found.append((origin / GENERATION_FILE, GENERATION_FILE))
        return [(file, name) for file, name in found if file.is_file()]

    def _say(self, came_as: str | None) -> Iterator[str]:
        if came_as not in (None, self.architecture):
            yield f"the model came as {came_as}, which cannot express its shape now: written as {self.architecture}"
        if not any(name in TOKENIZER_FILES for _, name in self._copied()):
            where = self._tokenizer or self._directory
            place = f"in {where}" if where is not None else "known"
            yield f"no tokenizer files are {place}: copy them beside {CONFIG} yourself"


def _check_source(source: Source, shape: ModelShape) -> None:
    """Raise CheckpointError unless a source holds every tensor of a shape, in its global shape."""
    for kind in kinds(shape):
        if kind.key not in source.tensors:
            raise CheckpointError(f"{kind.key} is missing: there is nothing to export it from")
        if (found := source.tensors[kind.key].shape) != (wanted := kind.global_shape(shape)):
            raise CheckpointError(f"{kind.key} has shape {found}, the model's is {wanted}")


def _boxes(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `limit` values, each one run of it, in its own order."""
    inner = math.prod(shape[1:])
    if inner > limit:
        for index in range(shape[0]):
            for box in _boxes(shape[1:], limit):
                yield ((index, index + 1), *box)
        return
    step = limit // inner
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *whole(shape[1:]))
