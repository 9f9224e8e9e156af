"""Recognize the format of a checkpoint by its file names, and open it for reading by slice.

    .metadata and metadata.json          Megatron's torch_dist
    .metadata alone                      torch.distributed.checkpoint (DCP)
    mp_rank_*/                           Megatron's legacy format
    config.json or *.safetensors         Hugging Face

A directory with Megatron's tracker file holds iterations; the one that the tracker names is opened.
"""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from megagrow.checkpoint.directory import has_common_state, iterations, manifest
from megagrow.checkpoint.formats.megatron_common import (
    RUN_CONFIG,
    argument_notes,
    layout_of_arguments,
    run_config_arguments,
    shape_of_arguments,
)
from megagrow.checkpoint.formats.torch_dist import (
    FlatOptimizerReader,
    TorchDistReader,
    gathered_buffers,
    open_dcp,
    read_flat_optimizer,
    scaling_states,
)
from megagrow.checkpoint.index import DType, OpenCheckpoint, Source
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError, UserError
from megagrow.files.bounded import read_small
from megagrow.tracker import MAX_ITERATION, MAX_TRACKER, TRACKER

_FLAT_OPTIMIZER = re.compile(r"^(chained_\d+\.)?optimizer\.distributed\.")
"""Keys of an optimizer that is saved as flat buffers and not tensor by tensor."""
_NAMED = 3
"""How many tensors a note names."""
_LOCAL = re.compile(r"^iter_\d{7}_\d+_local(\.dirty)?\.pt$")
_PRECISIONS = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}


def open_checkpoint(
    path: Path,
    *,
    shape: ModelShape | None = None,
    optimizer: bool = True,
    ignored_arguments: Collection[str] = (),
    checksums: bool = True,
) -> OpenCheckpoint:
    """Open a checkpoint of any format.

    Args:
        path: its directory, or a directory of iterations; of those the one that the tracker names is opened.
        shape: of the model, for checkpoints that do not record it.
        optimizer: whether to read Adam's state if there is one; without it, a checkpoint can be opened whose
            optimizer is not readable.
        ignored_arguments: names of saved arguments that Megatron-LM does not have and that the user knows not to
            change what the model computes.
        checksums: whether to compare all that is read with its checksums, if the checkpoint has some for its blocks.

    Raises:
        CheckpointError: the directory is not a checkpoint, or is incomplete.
    """
    path = resolve_directory(path)
    opener = _opener(path)
    try:
        if opener is _open_torch_dist:
            opened = _open_torch_dist(
                path, shape=shape, optimizer=optimizer, ignored_arguments=ignored_arguments, checksums=checksums
            )
        else:
            opened = opener(path, shape=shape, optimizer=optimizer, ignored_arguments=ignored_arguments)
    except UserError:
        raise
    except Exception as error:  # values that can be read can still be anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: damaged: {what[:300]}") from None
    iteration = opened.common.get("iteration")
    if iteration is not None and (type(iteration) is not int or not 0 <= iteration <= MAX_ITERATION):
        raise CheckpointError(f"{path}: damaged: its iteration is {iteration!s:.50}")
    return replace(opened, notes=(*opened.notes, *_type_notes(opened.source)))


def precision_of(source: Source) -> str:
    """Return the precision of the model weights: bf16, fp16 or fp32."""
    weights = [info.dtype for key, info in source.tensors.items() if not key.startswith("optimizer.")]
    return next((_PRECISIONS[dtype] for dtype in weights if dtype in _PRECISIONS), "fp32")


def _type_notes(source: Source) -> tuple[str, ...]:
    """Return a note that counts and names the tensors whose parts have several types."""
    mixed = [key for key, info in source.tensors.items() if any(chunk.dtype is not None for chunk in info.chunks)]
    if not mixed:
        return ()
    named = ", ".join(f"{key} as {source.tensors[key].dtype}" for key in mixed[:_NAMED])
    more = f" and {len(mixed) - _NAMED} more" if len(mixed) > _NAMED else ""
    return (f"{len(mixed)} stacked tensors have parts of several types and are read in the widest: {named}{more}",)


def resolve_directory(path: Path) -> Path:
    """Return the directory of one checkpoint; in a directory of iterations, the one that the tracker names."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not (path / TRACKER).is_file():
        return path
    text = read_small(path / TRACKER, end=MAX_TRACKER).decode(errors="replace").strip()
    if text == "release":
        return path / text
    latest = iterations.read_tracker(path)
    assert latest is not None
    return iterations.iteration_path(path, latest)


class _Opener(Protocol):
    def __call__(
        self, path: Path, *, shape: ModelShape | None, optimizer: bool, ignored_arguments: Collection[str]
    ) -> OpenCheckpoint: ...


def _opener(path: Path) -> _Opener:
    """Return the function that opens the format of a directory; CheckpointError if the format is unknown."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if ".metadata" in names:
        return _open_torch_dist if _is_written_by_megatron(path, names) else open_dcp
    if any(name.startswith("mp_rank_") for name in names):
        return _open_legacy
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return _open_huggingface
    if "metadata.json" in names:
        raise CheckpointError(f"{path}: incomplete torch_dist checkpoint: .metadata is missing")
    if local := _local_checkpoint(path):
        raise CheckpointError(
            f"{local}: a local (non-persistent) checkpoint of Megatron-LM, of which every node has a part, is not "
            "supported; load it with Megatron-LM and save it with --ckpt-format torch_dist"
        )
    listed = ", ".join(sorted(names)[:5]) or "no files"
    raise CheckpointError(
        f"{path}: not a checkpoint of a known format; it contains {listed}; known formats are Megatron's torch_dist "
        "(.metadata and metadata.json) and legacy format (mp_rank_* directories), torch.distributed.checkpoint "
        "(.metadata) and Hugging Face (config.json and *.safetensors)"
    )


def _local_checkpoint(path: Path) -> Path | None:
    """Return a file of a local checkpoint in a directory, in that of its rank or of its session; None if there is none.

    Source: nvidia-resiliency-ext, `checkpointing/local/ckpt_managers/local_manager.py`.
    """
    folders = [path, *sorted(path.glob("*/")), *sorted(path.glob("*/*/"))]
    found = (file for folder in folders for file in sorted(folder.iterdir()) if _LOCAL.match(file.name))
    return next(found, None)


def _is_written_by_megatron(path: Path, names: set[str]) -> bool:
    """Whether Megatron or megagrow wrote this, completely or not: metadata.json, which completes it, comes last."""
    if {"metadata.json", "common.pt", manifest.MANIFEST} & names:
        return True
    return has_common_state(path)


def _open_torch_dist(
    path: Path,
    *,
    shape: ModelShape | None,
    optimizer: bool,
    ignored_arguments: Collection[str],
    checksums: bool = True,
) -> OpenCheckpoint:
    stored = TorchDistReader(path, checksums=checksums)
    reader: TorchDistReader | FlatOptimizerReader = stored
    common = stored.common()
    name, layout = "Megatron torch_dist", None
    notes: tuple[str, ...] = ()
    if (path / manifest.MANIFEST).is_file():
        recorded = manifest.read_manifest(path)
        name, shape, layout = f"{name} (megagrow)", recorded.shape, recorded.layout
    elif isinstance(arguments := common.get("args"), dict):
        where = f"{path}: args"
        shape = shape_of_arguments(arguments, where, ignored_arguments)
        layout, notes = layout_of_arguments(arguments, where), argument_notes(arguments)
    elif (arguments := run_config_arguments(path)) is not None:
        shape = shape_of_arguments(arguments, RUN_CONFIG, ignored_arguments)
        layout, notes = layout_of_arguments(arguments, RUN_CONFIG), argument_notes(arguments)
    if not optimizer:
        stored.tensors = {key: info for key, info in stored.tensors.items() if not _FLAT_OPTIMIZER.match(key)}
    elif shape is not None:
        reader = read_flat_optimizer(stored, shape, layout)
        common = reader.common()  # describes the optimizer as it is read now
    else:
        stored.tensors |= gathered_buffers(stored)
        if any(_FLAT_OPTIMIZER.match(key) for key in stored.tensors):
            notes += (
                "its optimizer is stored in flat buffers, which can only be read once the model's shape is known",
            )
    if states := scaling_states(stored):
        notes += (
            f"it has fp8 scaling state ({len(states)} _extra_state are not empty, first {states[0]}): conversions that "
            "keep the shape carry it if Transformer Engine 2 wrote it; all others leave it out, to be measured anew",
        )
    return OpenCheckpoint(name, reader, shape, layout, common, notes)


def _open_huggingface(
    path: Path, *, shape: ModelShape | None, optimizer: bool, ignored_arguments: Collection[str]
) -> OpenCheckpoint:
    from megagrow.checkpoint.formats.huggingface import open_huggingface

    return open_huggingface(path, ignored_arguments)


def _open_legacy(
    path: Path, *, shape: ModelShape | None, optimizer: bool, ignored_arguments: Collection[str]
) -> OpenCheckpoint:
    from megagrow.checkpoint.formats.legacy import open_legacy

    return open_legacy(path, shape=shape, optimizer=optimizer, ignored_arguments=ignored_arguments)
