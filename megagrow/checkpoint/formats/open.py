"""Find out what a checkpoint is, and open it to be read by slice."""

import re
from pathlib import Path
from typing import Protocol

from megagrow.checkpoint.directory import COMMON_STATE, iterations, manifest
from megagrow.checkpoint.formats.torch_dist import (
    FlatOptimizerReader,
    TorchDistReader,
    gathered_buffers,
    read_flat_optimizer,
)
from megagrow.checkpoint.index import DType, OpenCheckpoint, Source
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER

_OTHER_OPTIMIZERS = re.compile(r"^(chained_\d+\.)?optimizer\.distributed\.")
"""Keys of an optimizer that is not saved tensor by tensor."""
_PRECISIONS = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16"}


def open_checkpoint(path: Path, *, shape: ModelShape | None = None, optimizer: bool = True) -> OpenCheckpoint:
    """Open a checkpoint of any format.

    Args:
        path: its directory; where that is one of iterations, the one that its tracker names is opened.
        shape: of its model, for those that do not say it themselves.
        optimizer: read Adam's state too, if there is one; without it a checkpoint may be read whose state may not.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    path = resolve(path)
    return _opener(path)(path, shape=shape, optimizer=optimizer)


def precision_of(source: Source) -> str:
    """Type of the model's own weights: bf16, fp16 or fp32."""
    weights = [info.dtype for key, info in source.tensors.items() if not key.startswith("optimizer.")]
    return next((_PRECISIONS[dtype] for dtype in weights if dtype in _PRECISIONS), "fp32")


def resolve(path: Path) -> Path:
    """The directory of one checkpoint: of a directory of iterations the one that its tracker names."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not (path / TRACKER).is_file():
        return path
    text = (path / TRACKER).read_text(errors="replace").strip()
    if text == "release":
        return path / text
    latest = iterations.read_tracker(path)
    assert latest is not None
    return iterations.iteration_path(path, latest)


class _Open(Protocol):
    def __call__(self, path: Path, *, shape: ModelShape | None, optimizer: bool) -> OpenCheckpoint: ...


def _opener(path: Path) -> _Open:
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if ".metadata" in names:
        return _torch_dist if _is_megatrons(path, names) else _dcp
    if any(name.startswith("mp_rank_") for name in names):
        return _legacy
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return _huggingface
    if "metadata.json" in names:
        raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: .metadata is missing")
    listed = ", ".join(sorted(names)[:5]) or "nothing"
    raise CheckpointError(
        f"{path}: holds no checkpoint that is known: {listed}; known are Megatron's torch_dist (.metadata and "
        "metadata.json), its mp_rank_* directories, torch.distributed.checkpoint (.metadata) and Hugging Face "
        "(config.json and *.safetensors)"
    )


def _is_megatrons(path: Path, names: set[str]) -> bool:
    """Whether Megatron or megagrow wrote it, or began to: metadata.json comes last, and without it nothing is whole."""
    if {"metadata.json", "common.pt", manifest.MANIFEST} & names:
        return True
    return COMMON_STATE.encode() in (path / ".metadata").read_bytes()


def _torch_dist(path: Path, *, shape: ModelShape | None, optimizer: bool) -> OpenCheckpoint:
    written = TorchDistReader(path)
    reader: TorchDistReader | FlatOptimizerReader = written
    common = written.common()
    name, layout = "Megatron torch_dist", None
    if (path / manifest.MANIFEST).is_file():
        known = manifest.read_manifest(path)
        name, shape, layout = f"{name} (megagrow)", known.shape, known.layout
    elif isinstance(arguments := common.get("args"), dict):
        from megagrow.checkpoint.formats.megatron_common import layout_of_arguments, shape_of_arguments

        shape, layout = shape_of_arguments(arguments), layout_of_arguments(arguments)
    notes: tuple[str, ...] = ()
    if not optimizer:
        written.tensors = {key: info for key, info in written.tensors.items() if not _OTHER_OPTIMIZERS.match(key)}
    elif shape is not None:
        reader = read_flat_optimizer(written, shape, layout)
        common = reader.common()  # which then says of the optimizer what it says now
    else:
        written.tensors |= gathered_buffers(written)
        if any(_OTHER_OPTIMIZERS.match(key) for key in written.tensors):
            notes = ("its optimizer lies in flat buffers, which are read once the model's shape is known",)
    return OpenCheckpoint(name, reader, shape, layout, common, notes)


def _dcp(path: Path, *, shape: ModelShape | None, optimizer: bool) -> OpenCheckpoint:
    from megagrow.checkpoint.formats.torch_dist import open_dcp

    return open_dcp(path, shape=shape, optimizer=optimizer)


def _huggingface(path: Path, *, shape: ModelShape | None, optimizer: bool) -> OpenCheckpoint:
    from megagrow.checkpoint.formats.huggingface import open_huggingface

    return open_huggingface(path)


def _legacy(path: Path, *, shape: ModelShape | None, optimizer: bool) -> OpenCheckpoint:
    from megagrow.checkpoint.formats.legacy import open_legacy

    return open_legacy(path, shape=shape, optimizer=optimizer)
