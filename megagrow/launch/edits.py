"""What was launched stays what it was: a stage that has begun keeps the settings that made its weights.

The first launch writes each stage, resolved, into `<save>/jobs/launched.json`; a later one compares. A stage that has
not begun may change in everything. One that has begun may change how it runs (layout, recomputation, what it asks of
the cluster), a finished one only the last of these. Where nothing was launched before, the stage's newest checkpoint
says what it was made with. `jobs/family.yaml`, beside it, is what the queued jobs read: an edit of the user's file
reaches nobody before the next launch.
"""

import json
from pathlib import Path
from typing import Any

from megagrow import records
from megagrow.atomic import write_whole
from megagrow.config import Family, to_yaml
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.plan import family_plan
from megagrow.records import StageRecord

_FORMAT = 1
_HOW_IT_RUNS = {"parallel", "recompute_granularity"}
_MANIFEST = "megagrow.json"


def refuse_edits(family: Family) -> None:
    """LaunchError where a stage that has begun is not what it was, with the first difference."""
    launched = _launched(family)
    for index, stage in enumerate(family.stages):
        paths = FamilyPaths(family).stage(index)
        last = paths.last_iteration()
        if last is None:
            continue
        before = launched.get(stage.name) or _made_with(family, index, last)
        now = _settings(family, index)
        # its record, not the plan: that may want more steps by now
        finished = any(isinstance(record, StageRecord) for record in records.read(paths.records))
        may = set() if finished else _HOW_IT_RUNS
        if stage.schedule.override_opt_param_scheduler and not finished:
            may |= {"schedule", "max_lr", "iterations"}
        difference = _difference({key: before[key] for key in before if key not in may}, now)
        if difference:
            key, old, new = difference
            state = "is finished" if finished else f"stands at iteration {last}"
            raise LaunchError(
                f"stages.{index} ({stage.name!r}) {state} and was trained with {key}={old}, not {new}: set it back, "
                "or choose another save to start anew"
            )


def freeze(family: Family) -> Path:
    """Write what is launched into the jobs' directory; return the family.yaml that the jobs read."""
    directory = FamilyPaths(family).jobs
    directory.mkdir(parents=True, exist_ok=True)
    stages = {stage.name: _settings(family, index) for index, stage in enumerate(family.stages)}
    write_whole(directory / "launched.json", json.dumps({"format": _FORMAT, "stages": stages}, indent=1))
    write_whole(frozen(family), f"# The family as it was last launched. Edit your own file instead.\n{to_yaml(family)}")
    return frozen(family)


def frozen(family: Family) -> Path:
    """The family.yaml that the jobs read."""
    return FamilyPaths(family).jobs / "family.yaml"


def _settings(family: Family, index: int) -> dict[str, Any]:
    """All that a stage's weights follow from, as plain JSON."""
    stage, planned = family.stages[index], family_plan(family).stages[index]
    excluded = {"cluster", "export", "train_tokens"}  # tokens: what counts is the number of steps that they come to
    settings = stage.model_dump(mode="json", exclude=excluded)
    settings["schedule"] = {
        key: value
        for key, value in settings["schedule"].items()
        if key not in ("max_lr", "override_opt_param_scheduler")
    }
    return {**settings, "max_lr": planned.max_lr, "iterations": planned.iterations, "seed": family.seed}


def _launched(family: Family) -> dict[str, dict[str, Any]]:
    path = FamilyPaths(family).jobs / "launched.json"
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        stages: dict[str, dict[str, Any]] = tree["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        raise LaunchError(
            f"{path}: cannot be read; remove it, and begun stages are judged by their checkpoints"
        ) from None
    return stages


def _made_with(family: Family, index: int, iteration: int) -> dict[str, Any]:
    """What the stage's newest checkpoint says of itself; nothing where it cannot be read: training will say why."""
    path = FamilyPaths(family).stage(index).checkpoints / f"iter_{iteration:07d}" / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schedule = dict(manifest.get("schedule") or {})
        found = {"model": manifest["shape"], "precision": manifest["precision"], "parallel": manifest["layout"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found |= {key: schedule.pop(key) for key in ("max_lr", "iterations") if key in schedule}
    return {**found, "schedule": schedule} if schedule else found


def _difference(before: Any, now: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """The first place at which something that was said before is another now; what was not said does not count."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key, value in before.items():
            found = _difference(value, now.get(key), f"{place}.{key}" if place else str(key))
            if found:
                return found
        return None
    return None if before == now else (place, before, now)
