"""Finds a stage by name or number, and its newest checkpoint."""

from pathlib import Path

from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import ConfigError, LaunchError


def stage_index(family: Family, stage: str) -> int:
    """The index of a stage by name or number; ConfigError, with all names, if there is none."""
    try:
        return family.stage_index(stage)
    except ValueError as error:
        raise ConfigError(f"--stage: {error}") from None


def newest_checkpoint(family: Family, index: int) -> Path:
    """Path of the newest checkpoint of a stage; LaunchError if it has none yet."""
    paths = FamilyPaths(family).stage(index)
    last = paths.last_iteration()
    if last is None:
        raise LaunchError(
            f"{paths.checkpoints}: stage {family.stages[index].name!r} has no checkpoint yet; train it first"
        )
    return paths.checkpoints / f"iter_{last:07d}"
