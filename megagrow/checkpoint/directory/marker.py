"""The marker files of Megatron's torch_dist format, which identify a directory as a complete checkpoint."""

from pathlib import Path

from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json, read_small

COMMON_STATE = "common_state"
"""Key of the object in which newer Megatron stores what older versions store in common.pt."""
MAX_INDEX = 256 << 20
"""Largest `.metadata` that is read, in bytes: one of a million chunks."""


def check_format(path: Path) -> None:
    """Raise CheckpointError unless its marker files identify a directory as a complete torch_dist checkpoint."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: incomplete torch_dist checkpoint: {name} is missing")
    found = read_json(path / "metadata.json")
    try:
        backend, version = found["sharded_backend"], found["sharded_backend_version"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'metadata.json'}: damaged: {type(error).__name__}: {error}") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(
            f"{path}: format {backend!s:.50} version {version!s:.50}; only torch_dist version 1 is read"
        )
    if not (path / "common.pt").is_file() and not has_common_state(path):
        raise CheckpointError(f"{path}: incomplete torch_dist checkpoint: common.pt is missing")


def has_common_state(path: Path) -> bool:
    """Whether the index of a checkpoint names the object that newer Megatron stores instead of common.pt."""
    return COMMON_STATE.encode() in read_small(path / ".metadata", MAX_INDEX)
