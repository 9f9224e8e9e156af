"""Find out what a checkpoint is, and open it to be read by slice."""

from collections.abc import Callable
from pathlib import Path

from megagrow.checkpoint import directory, manifest
from megagrow.checkpoint.store import Opened
from megagrow.checkpoint.torch_dist import Reader
from megagrow.config.paths import TRACKER
from megagrow.errors import CheckpointError


def open_checkpoint(path: Path) -> Opened:
    """Open a checkpoint of any format.

    Args:
        path: its directory; where that is one of iterations, the one that its tracker names is opened.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    path = resolve(path)
    return _opener(path)(path)


def resolve(path: Path) -> Path:
    """The directory of one checkpoint: of a directory of iterations the one that its tracker names."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not (path / TRACKER).is_file():
        return path
    text = (path / TRACKER).read_text(errors="replace").strip()
    if text == "release":
        return path / text
    latest = directory.read_tracker(path)
    assert latest is not None
    return directory.iteration_path(path, latest)


def _opener(path: Path) -> Callable[[Path], Opened]:
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if ".metadata" in names:
        return _torch_dist if "metadata.json" in names else _dcp
    if any(name.endswith(".safetensors") for name in names):
        return _huggingface
    if any(name.startswith("mp_rank_") for name in names):
        return _legacy
    if "metadata.json" in names:
        raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: .metadata is missing")
    listed = ", ".join(sorted(names)[:5]) or "nothing"
    raise CheckpointError(
        f"{path}: holds no checkpoint that is known: {listed}; known are Megatron's torch_dist (.metadata and "
        "metadata.json), its mp_rank_* directories, torch.distributed.checkpoint (.metadata) and Hugging Face "
        "(*.safetensors)"
    )


def _torch_dist(path: Path) -> Opened:
    reader = Reader(path)
    common = reader.common()
    if (path / manifest.FILE).is_file():
        known = manifest.read_manifest(path)
        return Opened("Megatron torch_dist (megagrow)", reader, known.shape, known.layout, common)
    arguments = common.get("args")
    if arguments is None:
        return Opened("Megatron torch_dist", reader, None, None, common)
    from megagrow.checkpoint.arguments import layout_of_arguments, shape_of_arguments

    return Opened("Megatron torch_dist", reader, shape_of_arguments(arguments), layout_of_arguments(arguments), common)


def _dcp(path: Path) -> Opened:
    from megagrow.checkpoint.dcp import open_dcp

    return open_dcp(path)


def _huggingface(path: Path) -> Opened:
    from megagrow.checkpoint.huggingface.read import open_huggingface

    return open_huggingface(path)


def _legacy(path: Path) -> Opened:
    from megagrow.checkpoint.legacy import open_legacy

    return open_legacy(path)
