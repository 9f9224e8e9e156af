"""The marker files of Megatron's torch_dist format, which identify a directory as a complete checkpoint."""

import json
from pathlib import Path

from megagrow.errors import CheckpointError

COMMON_STATE = "common_state"
"""Key of the object in which newer Megatron stores what older versions store in common.pt."""


def check_format(path: Path) -> None:
    """Raise CheckpointError unless its marker files identify a directory as a complete torch_dist checkpoint."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: {name} is missing")
    try:
        found = json.loads((path / "metadata.json").read_text())
        backend, version = found["sharded_backend"], found["sharded_backend_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'metadata.json'}: damaged: {type(error).__name__}: {error}") from None
    if (backend, version) != ("torch_dist", 1):
        raise CheckpointError(f"{path}: format {backend} version {version}; only torch_dist version 1 is read")
    if not (path / "common.pt").is_file() and COMMON_STATE.encode() not in (path / ".metadata").read_bytes():
        raise CheckpointError(f"{path}: not a whole torch_dist checkpoint: common.pt is missing")
