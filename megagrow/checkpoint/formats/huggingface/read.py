"""Read a Hugging Face directory by slice: index its safetensors files under Megatron's keys, without reading values.

    config.json                            the architecture and the shape
    model.safetensors                      all weights, or instead of it:
    model-00001-of-00002.safetensors       weights in several files, and
    model.safetensors.index.json           the file of each tensor

Every tensor of config.json's shape must be present in that shape, with one floating type per stacked tensor, and no
other tensor may be. The files' headers and the box pairs of the architecture locate every value.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.huggingface.architectures import Architecture
from megagrow.checkpoint.formats.huggingface.config import (
    CONFIG,
    architecture_of,
    read_config,
    shape_of,
    unknown_keys,
)
from megagrow.checkpoint.formats.huggingface.placement import BoxPair, box_pairs, tensor_shapes
from megagrow.checkpoint.formats.huggingface.safetensors_header import (
    SAFETENSORS_DTYPES,
    HeaderEntry,
    read_header,
)
from megagrow.checkpoint.index import Chunk, OpenCheckpoint, TensorInfo, row_major, tensor_of_chunks
from megagrow.checkpoint.reading import BLOCK, ChunkReader, Files
from megagrow.checkpoint.tensors import note_on_unknown, refuse_suspects, tensor_kinds
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from megagrow.files.bounded import is_plain_name, read_json_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX = 64 << 20
_MAX_VALUES_PER_BYTE = 64
"""A model with more than this number of values per byte of its files is refused without further checks."""
REMEMBERED = "huggingface"
"""Key of `OpenCheckpoint.common` for what a later export needs: model_type, config.json and directory."""
TensorFiles = dict[str, tuple[str, HeaderEntry]]
"""The file and the header entry of each tensor, by name."""


def open_huggingface(path: Path, ignored_keys: Collection[str] = ()) -> OpenCheckpoint:
    """Open a directory with config.json and safetensors files.

    Args:
        path: the directory.
        ignored_keys: keys of config.json that no table lists and that the user knows to be harmless.

    Raises:
        CheckpointError: it is incomplete or unsafe, or Megatron-Core does not have its model, or may not have it.
    """
    config = read_config(path)
    where = str(path / CONFIG)
    architecture, shape = architecture_of(config, where), shape_of(config, where)
    unknown, whose = unknown_keys(architecture, config), f"a key of {architecture.model_type} in transformers"
    refuse_suspects(unknown, config, where, whose, ignored_keys)
    found = find_tensors(path)
    _check_size(where, shape, found)
    table = max(architecture.variants, key=lambda rows: sum(pair.name in found for pair in box_pairs(rows, shape)))
    pairs = tuple(box_pairs(table, shape))
    notes = _check_tensors(path, architecture, shape, pairs, found)
    source = ChunkReader(path, _index(path, shape, pairs, found), {})
    remembered = {"model_type": architecture.model_type, "config": config, "directory": str(path.resolve())}
    return OpenCheckpoint(
        format=f"Hugging Face ({architecture.model_type})",
        source=source,
        shape=shape,
        layout=None,
        common={REMEMBERED: remembered},
        notes=(*notes, *note_on_unknown(unknown, config, "key of config.json", "transformers'")),
    )


def _check_size(where: str, shape: ModelShape, found: TensorFiles) -> None:
    """Raise CheckpointError if the files cannot possibly hold the model, before any work in proportion to its size."""
    if shape.num_layers > len(found):  # a layer has at least one tensor of its own
        raise CheckpointError(
            f"{where}: describes {shape.num_layers:,} layers, but the files hold {len(found)} tensors"
        )
    stored = sum(entry.length for _, entry in found.values())
    parts = shape.num_layers * (shape.groups + (shape.num_moe_experts or 0))
    if parts > max(stored, 1 << 20):
        raise CheckpointError(f"{where}: describes {parts:,} groups and experts, but the files hold {stored:,} bytes")
    expected = sum(math.prod(kind.global_shape(shape)) for kind in tensor_kinds(shape))
    if expected > _MAX_VALUES_PER_BYTE * max(stored, 1 << 20):
        raise CheckpointError(f"{where}: describes a model of {expected:,} values, but the files hold {stored:,} bytes")


def find_tensors(path: Path) -> TensorFiles:
    """Return all tensors of a directory's safetensors files; CheckpointError if files and index disagree."""
    if (path / WEIGHTS).is_file():
        return {name: (WEIGHTS, entry) for name, entry in read_header(path / WEIGHTS).items()}
    if not (path / INDEX).is_file():
        pickled = sorted(file.name for file in path.glob("pytorch_model*.bin"))
        hint = f"; {pickled[0]} is a pickle, which can run code: save the model as safetensors" if pickled else ""
        raise CheckpointError(f"{path}: neither {WEIGHTS} nor {INDEX} exists{hint}")
    listed = _weight_map(path / INDEX)
    found: TensorFiles = {}
    for file in sorted(set(listed.values())):
        for name, entry in read_header(path / file).items():
            if name in found:
                raise CheckpointError(f"{path}: {name} is in both {found[name][0]} and {file}: remove one")
            found[name] = (file, entry)
    for name, file in listed.items():
        if found.get(name, ("nowhere",))[0] != file:
            raise CheckpointError(f"{path / INDEX}: lists {name} in {file}, which does not contain it")
    if not_listed := sorted(set(found) - set(listed)):
        raise CheckpointError(f"{path / INDEX}: {len(not_listed)} tensors are not listed, first {not_listed[0]}")
    return found


def _weight_map(file: Path) -> dict[str, str]:
    """Return the file of each tensor from the index; all files must be in the directory of the index."""
    listed = read_json_object(file, _MAX_INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{file}: damaged: no weight_map")
    for name, target in listed.items():
        if not is_plain_name(target) or not target.endswith(".safetensors"):
            raise CheckpointError(
                f"{file}: refused: {name:.200} is in {target!r:.200}, not in a .safetensors file next to it"
            )
    return listed


def _check_tensors(
    path: Path, architecture: Architecture, shape: ModelShape, pairs: tuple[BoxPair, ...], found: TensorFiles
) -> tuple[str, ...]:
    """Raise CheckpointError unless tensors and shapes are those of the model; return notes on ignored ones."""
    shapes, notes = tensor_shapes(pairs), []
    if missing := [name for name in shapes if name not in found]:
        untied = missing == [architecture.output]
        hint = "; if the embedding is also the output layer, set tie_word_embeddings to true" if untied else ""
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}{hint}")
    for name, expected in shapes.items():
        file, entry = found[name]
        if entry.shape != expected:
            raise CheckpointError(f"{path / file}: {name} has shape {entry.shape}; {CONFIG} requires {expected}")
        if entry.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path / file}: {name} is {entry.dtype}; supported are {', '.join(SAFETENSORS_DTYPES)}"
            )
    ignored = re.compile("|".join(architecture.ignored))
    others = [name for name in found if name not in shapes and not ignored.search(name)]
    if shape.tied and architecture.output in others:
        others.remove(architecture.output)
        embedding = next(pair.name for pair in pairs)
        _check_equal(path, found, embedding, architecture.output)
        notes.append(f"{architecture.output} is a copy of {embedding} (tie_word_embeddings) and is left out")
    if others:
        raise CheckpointError(
            f"{path}: {len(others)} tensors do not belong to a {architecture.class_name} with this {CONFIG}, "
            f"first {min(others)}"
        )
    if buffers := len(found) - len(shapes) - len(notes):
        notes.append(f"{buffers} buffers without weights are left out")
    return tuple(notes)


def _check_equal(path: Path, found: TensorFiles, one: str, other: str) -> None:
    """Raise CheckpointError unless two tensors have the same bytes."""
    (first, entry), (second, copy) = found[one], found[other]
    files, equal = Files(path), (entry.dtype, entry.shape) == (copy.dtype, copy.shape)
    for start in range(0, entry.length if equal else 0, BLOCK):
        blocks = []
        for file, offset in ((first, entry.offset), (second, copy.offset)):
            blocks.append(bytearray(min(BLOCK, entry.length - start)))
            files.read(file, offset + start, memoryview(blocks[-1]))
        equal = equal and blocks[0] == blocks[1]
    files.close()
    if not equal:
        raise CheckpointError(
            f"{path}: {other} differs from {one}, but tie_word_embeddings is true: set it to false in {CONFIG}, "
            f"or remove {other}"
        )


def _index(path: Path, shape: ModelShape, pairs: tuple[BoxPair, ...], found: TensorFiles) -> Mapping[str, TensorInfo]:
    """Return the canonical tensors, with a chunk per box pair; one of parts of several types has the widest."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for pair in pairs:
        file, entry = found[pair.name]
        strides = row_major(entry.shape)
        start = sum(begin * stride for (begin, _), stride in zip(pair.place, strides, strict=True))
        strides = strides[::-1] if pair.transposed else strides
        lead = (1,) * (len(pair.box) - len(strides))
        chunks[pair.key].append(
            Chunk(
                pair.box,
                file,
                entry.offset,
                entry.length,
                start=start,
                strides=(*lead, *strides),
                dtype=SAFETENSORS_DTYPES[entry.dtype],
            )
        )
    return {
        kind.key: tensor_of_chunks(f"{path}: {kind.key}", kind.global_shape(shape), chunks[kind.key])
        for kind in tensor_kinds(shape)
    }


def remembered_of(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an import stored for a later export in a checkpoint's `common`; {} if it was not imported."""
    found = common.get(REMEMBERED)
    types = {"model_type": str, "config": dict, "directory": str}
    if not isinstance(found, dict) or any(not isinstance(found.get(name), types[name]) for name in types):
        return {}
    return {name: found[name] for name in types}
