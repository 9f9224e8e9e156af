"""Where the history of a stage is on disk: in the checkpoint that the tracker names, before the first in a file."""

import json
from pathlib import Path
from typing import Any

from megagrow.config import Family
from megagrow.config.paths import FamilyPaths, StagePaths
from megagrow.errors import UserError
from megagrow.files.atomic import write_atomically
from megagrow.history.lock import is_held
from megagrow.history.record import StageHistory, history_of_manifest

_MANIFEST = "megagrow.json"


def read_history(paths: StagePaths) -> StageHistory | None:
    """The history of a stage; None before it begins, or where its checkpoint cannot be read, as training reports.

    A stage without a checkpoint has begun only while a process trains it: if that dies, nothing of it is left.
    """
    last = paths.last_iteration()
    if last is None:
        return _read(paths.history) if is_held(paths.lock) else None
    return _read(paths.checkpoints / f"iter_{last:07d}" / _MANIFEST)


def write_history(paths: StagePaths, history: StageHistory) -> None:
    """Write the history of a stage that begins, goes on or ends; UserError if the disk does not allow it."""
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        write_atomically(paths.history, history.model_dump_json(indent=1))
    except OSError as error:
        raise UserError(f"{paths.history}: {error.strerror}: the stage's history cannot be written here") from None


def has_only_discarded_steps(paths: StagePaths) -> bool:
    """Whether the steps on record are of a process that died before its first checkpoint: the next starts over."""
    return paths.last_iteration() is None and paths.history.is_file() and is_held(paths.lock) is False


def prepared_tokens(family: Family) -> dict[str, int] | None:
    """The number of tokens of each source of the prepared data; None if it is not prepared, or not readable."""
    tree = _json(FamilyPaths(family).prepared)
    try:
        return {str(name): int(source["tokens"]) for name, source in tree["sources"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _read(path: Path) -> StageHistory | None:
    tree = _json(path)
    try:
        return history_of_manifest(tree if "history" in tree or "shape" in tree else {"history": tree})
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
