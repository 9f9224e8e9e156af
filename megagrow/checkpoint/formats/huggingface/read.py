"""A Hugging Face directory as a checkpoint: an index of its safetensors files under Megatron's keys, and no values.

Every tensor that config.json's shape has must be there, in its shape and one floating type a stack, and no other. Where
each value lies follows from the files' headers and the parts of the architecture, so reading is slicing, as with any
other format.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.huggingface.architectures import Architecture
from megagrow.checkpoint.formats.huggingface.config import CONFIG, architecture_of, read_config, shape_of
from megagrow.checkpoint.formats.huggingface.placement import BoxPair, box_pairs, tensor_shapes
from megagrow.checkpoint.formats.huggingface.safetensors_header import (
    SAFETENSORS_DTYPES,
    HeaderEntry,
    parse_json,
    read_header,
)
from megagrow.checkpoint.index import Chunk, OpenCheckpoint, TensorInfo, row_major
from megagrow.checkpoint.reading import BLOCK, ChunkReader, Files
from megagrow.checkpoint.tensors import kinds
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_ABSURD = 64
REMEMBERED = "huggingface"
"""Key of `Opened.common` under which stands what an export needs again: model_type, config.json and directory."""
Found = dict[str, tuple[str, HeaderEntry]]
"""Tensors by name: in which file, and where in it."""


def open_huggingface(path: Path) -> OpenCheckpoint:
    """Open a directory with config.json and safetensors files.

    Raises:
        CheckpointError: it is not whole, not safe, or its model is one that Megatron-Core does not have.
    """
    config = read_config(path)
    where = str(path / CONFIG)
    architecture, shape = architecture_of(config, where), shape_of(config, where)
    found = find_tensors(path)
    _check_size(where, shape, found)
    table = max(architecture.variants, key=lambda rows: sum(part.name in found for part in box_pairs(rows, shape)))
    placed = tuple(box_pairs(table, shape))
    notes = _check_tensors(path, architecture, shape, placed, found)
    source = ChunkReader(path, _index(path, shape, placed, found), {})
    remembered = {"model_type": architecture.model_type, "config": config, "directory": str(path.resolve())}
    return OpenCheckpoint(
        format=f"Hugging Face ({architecture.model_type})",
        source=source,
        shape=shape,
        layout=None,
        common={REMEMBERED: remembered},
        notes=notes,
    )


def _check_size(where: str, shape: ModelShape, found: Found) -> None:
    """Raise CheckpointError before anything is counted out for a model that the files can by no means hold."""
    wanted = sum(math.prod(kind.global_shape(shape)) for kind in kinds(shape))
    held = sum(entry.length for _, entry in found.values())
    if wanted > _ABSURD * max(held, 1 << 20):
        raise CheckpointError(f"{where}: a model of {wanted:,} values, whose files hold {held:,} bytes")


def find_tensors(path: Path) -> Found:
    """Return all tensors of a directory's safetensors files; CheckpointError where files and index disagree."""
    if (path / WEIGHTS).is_file():
        return {name: (WEIGHTS, entry) for name, entry in read_header(path / WEIGHTS).items()}
    if not (path / INDEX).is_file():
        pickled = sorted(file.name for file in path.glob("pytorch_model*.bin"))
        hint = f"; {pickled[0]} is a pickle, which may run code: save the model as safetensors" if pickled else ""
        raise CheckpointError(f"{path}: neither {WEIGHTS} nor {INDEX} is there{hint}")
    listed = _weight_map(path / INDEX)
    found: Found = {}
    for file in sorted(set(listed.values())):
        for name, entry in read_header(path / file).items():
            if name in found:
                raise CheckpointError(f"{path}: {name} stands in both {found[name][0]} and {file}: remove one")
            found[name] = (file, entry)
    for name, file in listed.items():
        if found.get(name, ("nowhere",))[0] != file:
            raise CheckpointError(f"{path / INDEX}: {name} is said to be in {file}, but is not there")
    if unlisted := sorted(set(found) - set(listed)):
        raise CheckpointError(f"{path / INDEX}: {len(unlisted)} tensors are not listed, first {unlisted[0]}")
    return found


def _weight_map(file: Path) -> dict[str, str]:
    """File of each tensor, as the index has it; files lie beside the index."""
    listed = parse_json(file.read_bytes(), str(file)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{file}: damaged: it has no weight_map")
    for name, place in listed.items():
        if not isinstance(place, str) or Path(place).name != place or not place.endswith(".safetensors"):
            raise CheckpointError(f"{file}: refused: {name} is in {place!r}; read are .safetensors files beside it")
    return listed


def _check_tensors(
    path: Path, architecture: Architecture, shape: ModelShape, placed: tuple[BoxPair, ...], found: Found
) -> tuple[str, ...]:
    """Raise CheckpointError unless all tensors are there in their shapes, and no others; return what was left out."""
    shapes, notes = tensor_shapes(placed), []
    if missing := [name for name in shapes if name not in found]:
        untied = missing == [architecture.output]
        hint = "; if the embedding is the output layer too, set tie_word_embeddings to true" if untied else ""
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}{hint}")
    for name, wanted in shapes.items():
        file, entry = found[name]
        if entry.shape != wanted:
            raise CheckpointError(f"{path / file}: {name} has shape {entry.shape}; by {CONFIG} it is {wanted}")
        if entry.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path / file}: {name} is {entry.dtype}; only {', '.join(SAFETENSORS_DTYPES)} can be read"
            )
    ignored = re.compile("|".join(architecture.ignored))
    others = [name for name in found if name not in shapes and not ignored.search(name)]
    if shape.tied and architecture.output in others:
        others.remove(architecture.output)
        embedding = next(part.name for part in placed)
        _check_equal(path, found, embedding, architecture.output)
        notes.append(f"{architecture.output} is {embedding} once more (tie_word_embeddings): left out")
    if others:
        raise CheckpointError(
            f"{path}: {len(others)} tensors that a {architecture.class_name} of this {CONFIG} does not have, "
            f"first {min(others)}"
        )
    if buffers := len(found) - len(shapes) - len(notes):
        notes.append(f"{buffers} buffers without weights: left out")
    return tuple(notes)


def _check_equal(path: Path, found: Found, one: str, other: str) -> None:
    """Raise CheckpointError unless two tensors have the same bytes."""
    (first, entry), (second, same) = found[one], found[other]
    files, alike = Files(path), (entry.dtype, entry.shape) == (same.dtype, same.shape)
    for start in range(0, entry.length if alike else 0, BLOCK):
        pieces = []
        for file, offset in ((first, entry.offset), (second, same.offset)):
            pieces.append(bytearray(min(BLOCK, entry.length - start)))
            files.read(file, offset + start, memoryview(pieces[-1]))
        alike = alike and pieces[0] == pieces[1]
    files.close()
    if not alike:
        raise CheckpointError(
            f"{path}: {other} differs from {one}, but tie_word_embeddings is true: set it to false in {CONFIG}, "
            f"or remove {other}"
        )


def _index(path: Path, shape: ModelShape, placed: tuple[BoxPair, ...], found: Found) -> Mapping[str, TensorInfo]:
    """The canonical tensors, with a chunk for each part; CheckpointError where a stack is of several types."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    types: dict[str, dict[str, str]] = defaultdict(dict)
    for part in placed:
        file, entry = found[part.name]
        types[part.key].setdefault(entry.dtype, part.name)
        strides = row_major(entry.shape)
        start = sum(begin * stride for (begin, _), stride in zip(part.place, strides, strict=True))
        strides = strides[::-1] if part.transposed else strides
        lead = (1,) * (len(part.box) - len(strides))
        chunks[part.key].append(
            Chunk(part.box, file, entry.offset, entry.length, start=start, strides=(*lead, *strides))
        )
    for key, names in types.items():
        if len(names) > 1:
            said = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
            raise CheckpointError(f"{path}: {said}: the parts of one stacked tensor ({key}) must have one type")
    return {
        kind.key: TensorInfo(
            kind.global_shape(shape), SAFETENSORS_DTYPES[next(iter(types[kind.key]))], tuple(chunks[kind.key])
        )
        for kind in kinds(shape)
    }


def remembered_of(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an import left for an export in a checkpoint's `common`: {} if it came from elsewhere."""
    found = common.get(REMEMBERED)
    types = {"model_type": str, "config": dict, "directory": str}
    if not isinstance(found, dict) or any(not isinstance(found.get(name), types[name]) for name in types):
        return {}
    return {name: found[name] for name in types}
