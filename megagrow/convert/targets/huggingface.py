"""A Hugging Face directory planned to the byte: safetensors files, written piece by piece from any checkpoint.

Shapes determine the length of every file and the offset of each tensor in it, so headers are written before any value
is read. Values are read as boxes of Megatron's tensors and assembled into a piece of a Hugging Face tensor. Memory
holds one piece and the boxes that it was read from, nothing more.
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
    choose_architecture,
    compose_config,
    new_parameters,
    stop_tokens,
    tensor_shapes,
    write_header,
)
from megagrow.checkpoint.index import Box, DType, Raw, Source, bytes_of, intersect, raw_of, sizes, tensor_of, whole_box
from megagrow.checkpoint.tensors import tensor_kinds
from megagrow.config import ModelShape
from megagrow.convert.plan import kept_keys
from megagrow.convert.targets.finite import FiniteCheck
from megagrow.convert.targets.protocol import OutputFile
from megagrow.convert.targets.tokenizer import write_tokenizer
from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep

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
    "chat_template.json",
    "vocab.txt",
    "spiece.model",
)
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
GENERATION_FILE = "generation_config.json"


class HuggingFaceTarget:
    """A planned Hugging Face directory of any source's weights; a unit is one file of weights.

    Attributes:
        architecture: its model_type.
        config: content of config.json.
        units: the weight files; a single one has no number in its name, as transformers expects.
        notes: changes of the architecture, and missing tokenizer files.
        finite: looks at all values that are produced.
    """

    def __init__(
        self,
        source: Source,
        shape: ModelShape,
        dtype: DType | None = None,
        *,
        remembered: Mapping[str, Any] | None = None,
        elsewhere: bool = False,
        named: Path | None = None,
        tokenizer: Path | None = None,
        shard_bytes: int = SHARD_BYTES,
        piece_bytes: int = PIECE_BYTES,
        finite: FiniteCheck | None = None,
    ) -> None:
        """Plan all files.

        Args:
            source: canonical tensors; the model's own weights are exported, not the masters.
            shape: of the model; padding rows of the vocabulary are left out.
            dtype: of the files: float32, bfloat16 or float16, except tensors that stay float32 (see `kept_keys`);
                None keeps each tensor's own.
            remembered: content of `common["huggingface"]` as stored by `open_huggingface`: architecture, config.json
                and the directory whose tokenizer and generation files are copied.
            elsewhere: whether that directory is not part of the source. Then it is named in a note, and nothing in it
                is looked at: a checkpoint may name any directory.
            named: the tokenizer that a checkpoint names where nothing is remembered; it is treated alike.
            tokenizer: a tokenizer file, or a directory of them, to copy instead.
            shard_bytes: most bytes of values in a file; a larger tensor gets a file of its own.
            piece_bytes: bytes of values to yield at a time.
            finite: looks at all values that are produced.

        Raises:
            CheckpointError: no architecture can express the shape, or the source lacks one of its tensors.
        """
        self.finite, remembered = finite or FiniteCheck(), remembered or {}
        self._source, self._piece_bytes = source, piece_bytes
        origin = Path(remembered["directory"]) if "directory" in remembered else None
        self._directory: Path | None = None if elsewhere else origin
        self._elsewhere: Path | None = origin if elsewhere else (named if origin is None else None)
        self._tokenizer = tokenizer
        chosen = choose_architecture(shape, remembered.get("model_type"))
        self.architecture = chosen.model_type
        placed = tuple(box_pairs(chosen.variants[0], shape))
        _check_source(source, shape)
        self._parts: dict[str, list[BoxPair]] = defaultdict(list)
        for part in placed:
            self._parts[part.name].append(part)
        self._placed, self._shape = placed, shape
        self._shapes = tensor_shapes(placed)
        kept = kept_keys(source.tensors, dtype) if dtype else frozenset[str]()
        self._dtypes = {part.name: dtype or source.tensors[part.key].dtype for part in placed}
        self._dtypes |= {part.name: DType.FLOAT32 for part in placed if part.key in kept}
        for name, found in self._dtypes.items():
            if found not in SAFETENSORS_DTYPES.values():
                raise CheckpointError(f"{name} is {found}: choose a dtype for the export: float32, bfloat16 or float16")
        stored_type = str(dtype or self._dtypes[placed[0].name])
        self.config = compose_config(shape, chosen, remembered.get("config"), stored_type)
        self._stops = stop_tokens(tokenizer) if tokenizer is not None and tokenizer.is_file() else {}
        if not remembered.get("config"):  # else the model keeps what it came with
            self.config |= self._stops
        self._shards = self._cut(shard_bytes)
        self._headers = [
            write_header((name, self._dtypes[name], self._shapes[name]) for name in shard) for shard in self._shards
        ]
        self.notes = tuple(self._notes(remembered.get("model_type")))

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit, one per unit."""
        return tuple(
            (OutputFile(self._file(index), len(self._headers[index]) + sum(map(self._bytes, shard))),)
            for index, shard in enumerate(self._shards)
        )

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (0, the next bytes of the unit's only file): its header, then tensor after tensor."""
        yield 0, self._headers[unit]
        for name in self._shards[unit]:
            for box in _boxes(self._shapes[name], max(1, self._piece_bytes // self._dtypes[name].itemsize)):
                values = self._piece(name, box)
                self.finite.look(name, tuple(start for start, _ in box), values, self._dtypes[name])
                yield 0, bytes_of(values)
            for part in self._parts[name]:
                self._source.forget(part.key, part.box)

    def finish(self, staging: Path, common: Mapping[str, Any] | None = None) -> None:
        """Write the index of several weight files, config.json, and copies of tokenizer and generation files."""
        if len(self._shards) > 1:
            listed = {name: self._file(index) for index, shard in enumerate(self._shards) for name in shard}
            total = sum(map(self._bytes, self._shapes))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (staging / CONFIG).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        for file, name in self._copied():
            shutil.copyfile(file, staging / name)
        if self._stops and not (staging / GENERATION_FILE).exists():
            (staging / GENERATION_FILE).write_text(json.dumps(self._stops, indent=2, sort_keys=True) + "\n")
        if self._tokenizer is not None and self._tokenizer.suffix == ".model":
            self.notes = (*self.notes, *write_tokenizer(self._tokenizer, staging))

    def new_parameters(self, step: GrowthStep) -> dict[str, Any]:
        """Return the names of what a growth step added, as transformers names it."""
        return new_parameters(step, self._placed, self._shape)

    def _piece(self, name: str, box: Box) -> Raw:
        """The values of a box of a Hugging Face tensor."""
        piece = np.empty(sizes(box), self._dtypes[name].raw)
        for part in self._parts[name]:
            common = intersect(part.place, box)
            if common is None:
                continue
            inner = tuple((a - start, b - start) for (a, b), (start, _) in zip(common, part.place, strict=True))
            inner = inner[::-1] if part.transposed else inner
            lead = len(part.box) - len(inner)
            bounds = zip(part.box[lead:], inner, strict=True)
            wanted = (*part.box[:lead], *((start + a, start + b) for (start, _), (a, b) in bounds))
            values = self._values(name, part.key, wanted).reshape(sizes(inner))
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            piece[into] = values.T if part.transposed else values
        return piece

    def _values(self, name: str, key: str, box: Box) -> Raw:
        """Values of Megatron's tensor in the type of a Hugging Face tensor; torch is used only if they must be cast."""
        stored, wanted = self._source.tensors[key].dtype, self._dtypes[name]
        raw = self._source.raw(key, box)
        if stored == wanted:
            return raw
        values = tensor_of(raw, stored)
        cast = values.to(wanted.torch)
        if wanted is DType.FLOAT16 and not cast.isfinite().all() and values.isfinite().all():
            raise CheckpointError(f"{name}: values beyond float16's range: export in bfloat16 or float32")
        return raw_of(cast)

    def _cut(self, shard_bytes: int) -> list[list[str]]:
        """Distribute tensors over files, in order. In a file wider types come first, so that every value is aligned."""
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
            settings = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
            found += [(tokenizer, name), *((tokenizer.with_name(each), each) for each in settings)]
        elif tokenizer is not None:
            found += [(tokenizer / name, name) for name in TOKENIZER_FILES]
        if origin is not None:
            found += [(origin / name, name) for name in (GENERATION_FILE, *LICENSE_FILES)]
        return [(file, name) for file, name in found if file.is_file() and not self._leaves(file)]

    def _leaves(self, file: Path) -> bool:
        """Whether a file of the source is a link that leads out of it. What a user names may lie anywhere."""
        origin = self._directory
        return (
            origin is not None and file.parent == origin and _with_blobs(origin.resolve()) not in file.resolve().parents
        )

    def _notes(self, imported_as: str | None) -> Iterator[str]:
        if imported_as not in (None, self.architecture):
            yield f"the model was {imported_as}, which cannot express its present shape: written as {self.architecture}"
        if self._directory is not None:
            for name in (*TOKENIZER_FILES, GENERATION_FILE):
                if (self._directory / name).is_file() and self._leaves(self._directory / name):
                    yield f"{self._directory / name} is a link that leaves its directory, and is not copied"
        if self._elsewhere is not None and self._tokenizer is None:
            yield (
                f"the checkpoint names {self._elsewhere} for its tokenizer; only files of the checkpoint itself are "
                f"copied: --tokenizer {self._elsewhere} copies those"
            )
        elif not any(name in TOKENIZER_FILES for _, name in self._copied()):
            searched = self._tokenizer or self._directory
            known = f"found in {searched}" if searched is not None else "known"
            yield f"no tokenizer files are {known}: copy them next to {CONFIG} yourself"


def _with_blobs(directory: Path) -> Path:
    """Return the directory in which the links of a model must stay: its own; in Hugging Face's cache, the model's.

    There, `<model>/snapshots/<commit>/tokenizer.json` is a link to `<model>/blobs/<hash>`.
    """
    model = directory.parents[1] if len(directory.parents) > 1 else directory
    return model if directory.parent.name == "snapshots" and (model / "blobs").is_dir() else directory


def _check_source(source: Source, shape: ModelShape) -> None:
    """Raise CheckpointError unless a source holds every tensor of a model's shape."""
    for kind in tensor_kinds(shape):
        if kind.key not in source.tensors:
            raise CheckpointError(f"{kind.key} is missing in the source")
        if (found := source.tensors[kind.key].shape) != (wanted := kind.global_shape(shape)):
            raise CheckpointError(f"{kind.key} has shape {found}, the model's is {wanted}")


def _boxes(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `limit` values, each contiguous, in row-major order."""
    inner = math.prod(shape[1:])
    if inner > limit:
        for index in range(shape[0]):
            for box in _boxes(shape[1:], limit):
                yield ((index, index + 1), *box)
        return
    step = limit // inner
    for start in range(0, shape[0], step):
        yield ((start, min(start + step, shape[0])), *whole_box(shape[1:]))
