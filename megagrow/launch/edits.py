"""Rejects edits of a family.yaml that would change how a stage that has already started is trained.

Each launch writes the resolved settings of every stage to `<save>/jobs/launched.json`, and the next launch compares
with them. A stage that has not started may change in every setting. A started stage may change only how it runs
(layout, recomputation, requested resources), a finished stage only its requested resources. If nothing was launched
before, the settings are taken from the manifest of the stage's newest checkpoint. The queued jobs read a copy of the
family, `<save>/jobs/family.yaml`, so an edit of the user's file takes effect at the next launch.
"""

import json
from pathlib import Path
from typing import Any

from megagrow.atomic import write_atomically
from megagrow.bounded import read_json_object
from megagrow.config import Family, to_yaml
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.launch.graph import stage_end_times
from megagrow.plan import family_plan

_FORMAT = 1
_EXECUTION_SETTINGS = {"parallel", "recompute_granularity"}
_MANIFEST = "megagrow.json"


def refuse_edits(family: Family) -> None:
    """Raise LaunchError, with the first difference, if the settings of a stage that has started were edited."""
    launched = _launched_settings(family)
    for index, stage in enumerate(family.stages):
        last = FamilyPaths(family).stage(index).last_iteration()
        if last is None:
            continue
        before = launched.get(stage.name) or _checkpoint_settings(family, index, last)
        now = _settings(family, index)
        # the record decides, not the plan: an edited plan may ask for more steps
        finished = bool(stage_end_times(family, index))
        editable = set() if finished else _EXECUTION_SETTINGS
        if stage.schedule.override_opt_param_scheduler and not finished:
            editable |= {"schedule", "max_lr", "iterations"}
        difference = _first_difference({key: before[key] for key in before if key not in editable}, now)
        if difference:
            key, old, new = difference
            state = "is finished" if finished else f"is at iteration {last}"
            raise LaunchError(
                f"stages.{index} ({stage.name!r}) {state} and was trained with {key}={old}, not {new}: restore the old "
                "value, or choose another save directory to start over"
            )


def freeze(family: Family) -> Path:
    """Write the launched settings and the family.yaml that the jobs read; return the path of the latter."""
    directory = FamilyPaths(family).jobs
    directory.mkdir(parents=True, exist_ok=True)
    stages = {stage.name: _settings(family, index) for index, stage in enumerate(family.stages)}
    write_atomically(directory / "launched.json", json.dumps({"format": _FORMAT, "stages": stages}, indent=1))
    write_atomically(
        frozen_yaml(family),
        f"# The family as it was last launched. Edit your own family.yaml, not this copy.\n{to_yaml(family)}",
    )
    return frozen_yaml(family)


def frozen_yaml(family: Family) -> Path:
    """Path of the family.yaml that the jobs read."""
    return FamilyPaths(family).jobs / "family.yaml"


def _settings(family: Family, index: int) -> dict[str, Any]:
    """Every setting that determines a stage's weights, as plain JSON."""
    stage, planned = family.stages[index], family_plan(family).stages[index]
    excluded = {"cluster", "export", "train_tokens"}  # the resulting number of steps is compared instead of tokens
    settings = stage.model_dump(mode="json", exclude=excluded)
    settings["schedule"] = {
        key: value
        for key, value in settings["schedule"].items()
        if key not in ("max_lr", "override_opt_param_scheduler")
    }
    return {**settings, "max_lr": planned.peak_lr, "iterations": planned.iterations, "seed": family.seed}


def _launched_settings(family: Family) -> dict[str, dict[str, Any]]:
    path = FamilyPaths(family).jobs / "launched.json"
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        stages: dict[str, dict[str, Any]] = tree["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LaunchError(
            f"{path}: cannot be read; if you remove it, started stages are compared with their checkpoints instead"
        ) from None
    return stages


def _checkpoint_settings(family: Family, index: int, iteration: int) -> dict[str, Any]:
    """Settings in the manifest of a stage's checkpoint; empty if it cannot be read, which training reports later."""
    path = FamilyPaths(family).stage(index).checkpoints / f"iter_{iteration:07d}" / _MANIFEST
    try:
        manifest = read_json_object(path)
        schedule = dict(manifest.get("schedule") or {})
        found = {"model": manifest["shape"], "precision": manifest["precision"], "parallel": manifest["layout"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found |= {key: schedule.pop(key) for key in ("max_lr", "iterations") if key in schedule}
    return {**found, "schedule": schedule} if schedule else found


def _first_difference(before: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose value differs, with both values; keys that are missing from `before` are ignored."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key, value in before.items():
            found = _first_difference(value, now.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if before == now else (path, before, now)
