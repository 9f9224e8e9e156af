"""The one rule on edits of a family.yaml: what made the weights of a stage cannot be changed afterwards.

    not begun            everything may change
    at iteration 0       what made the first weights may not: model, growth, precision, seed, load
    in training          how it runs may change (layout, recomputation), and with `override_opt_param_scheduler` the
                         schedule and the number of steps, down to the steps taken; the same for a live process that
                         has not saved yet
    finished             nothing may change, but with `override_opt_param_scheduler` a stage may get more tokens, and
                         is then in training again

Settings that no history has (validation, checkpoints, trackers, resources) may change at any time.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from megagrow.config import Batch, Family, GrowthConfig, ModelShape, ParallelLayout, Schedule
from megagrow.config.base import Section
from megagrow.config.function import FIELDS, Part, filled
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.history.lock import is_held
from megagrow.history.record import StageHistory
from megagrow.history.store import prepared_tokens, read_history
from megagrow.plan import family_plan

Difference = tuple[str, Any, Any]
"""A key, its value in the history, and its value now."""

_FIRST_WEIGHTS = {"model", "growth", "precision", "seed", "load"}
_TRAINING_ONLY = {f"model.{name}" for name, field in FIELDS.items() if field.part is Part.TRAINING}
_EXECUTION = {"parallel", "recompute_granularity"}
_SCHEDULE = {"schedule", "max_lr", "iterations"}
_SECTIONS: dict[str, type[Section]] = {
    "model": ModelShape,
    "growth": GrowthConfig,
    "batch": Batch,
    "schedule": Schedule,
    "parallel": ParallelLayout,
}
_SHOWN = 6
_ABSENT = object()


def current_settings(family: Family, index: int) -> dict[str, Any]:
    """The settings of a stage as a `StageHistory` has them, as plain JSON."""
    stage, planned = family.stages[index], family_plan(family).stages[index]
    settings: dict[str, Any] = {
        "name": family.name,
        "seed": family.seed,
        "data": family.data.model_dump(mode="json", exclude={"workers"}),
        "tokenizer": family.tokenizer.model_dump(mode="json"),
        **stage.model_dump(mode="json", include={"model", "growth", "batch", "precision", "load"}),
        "schedule": stage.schedule.model_dump(mode="json", exclude={"max_lr", "override_opt_param_scheduler"}),
        # what the plan made of max_lr and train_tokens, which may be automatic
        "max_lr": planned.peak_lr,
        "iterations": planned.iterations,
        **stage.model_dump(mode="json", include=_EXECUTION),
    }
    tokens = prepared_tokens(family)
    return settings if tokens is None else {**settings, "prepared": tokens}


def refuse_edits(family: Family, *, but: Collection[int] = ()) -> None:
    """Raise LaunchError if a stage was made with other settings than the family has now.

    Args:
        family: the family, as its yaml and the overrides have it now.
        but: indices of stages that are not compared, because they are about to be replaced.
    """
    for index in range(len(family.stages)):
        paths = FamilyPaths(family).stage(index)
        history = None if index in but else read_history(paths)
        if history is not None:
            refuse_difference(family, index, history, running=bool(is_held(paths.lock)))


def refuse_difference(family: Family, index: int, history: StageHistory, *, running: bool = False) -> None:
    """Raise LaunchError, with both values, if the history of a stage has other settings than the family has now.

    Args:
        family, index: the family, and the index of the stage.
        history: the history of the stage.
        running: a process trains the stage right now.
    """
    now, stage = current_settings(family, index), family.stages[index]
    override, done = stage.schedule.override_opt_param_scheduler, history.iteration
    planned = history.iterations
    in_training = planned is None or done < planned
    goes_on = in_training or (override and now["iterations"] > (planned or 0))
    settings = {"load": None, **history.settings}  # that of an older version was not loaded
    fixed = set(settings)
    if not done and not running:
        fixed &= _FIRST_WEIGHTS
    elif goes_on:
        fixed -= _EXECUTION | (_SCHEDULE if override and now["iterations"] >= done else set())
    found = differences({key: value for key, value in settings.items() if key in fixed}, now)
    if "schedule" not in history.settings:  # no step was taken: what only training uses has made no weight yet
        found = [difference for difference in found if difference[0] not in _TRAINING_ONLY]
    if not found:
        return
    state = f"is at iteration {done}" if in_training or not done else "is finished"
    made = "trained" if done else "made"
    shown = ", ".join(f"{key}={_text(old)}, not {_text(new)}" for key, old, new in found[:_SHOWN])
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    cure = _cure(family, index, history, found)
    raise LaunchError(f"stages.{index} ({stage.name!r}) {state} and was {made} with {shown}{more}: {cure}")


def _cure(family: Family, index: int, history: StageHistory, found: list[Difference]) -> str:
    """What a user can do about differences, as words."""
    stage = family.stages[index]
    keys = {key.split(".")[0] for key, _, _ in found}
    words = f"restore the old value{'s' if len(found) > 1 else ''}"
    if not history.iteration and history.state == "grown":
        words += f", grow it again with `megagrow convert FAMILY --stage {stage.name} --overwrite`"
    elif keys <= _SCHEDULE and not stage.schedule.override_opt_param_scheduler:
        words += f", set stages.{index}.schedule.override_opt_param_scheduler=true"
        words += " (a finished stage also needs more tokens)" if history.state == "finished" else ""
    return f"{words}, or choose another save directory to start over"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ, by dotted key; those that one side does not have are compared with their default."""
    found: list[Difference] = []
    for key, old in before.items():
        if key not in now:
            continue  # unknown now, such as the tokens of data that was removed
        fields = _SECTIONS[key].model_fields if key in _SECTIONS else {}
        defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
        new = now[key]
        if key == "model":
            old, new, defaults = *_filled(old, new), {}
        found += _compare(old, new, key, defaults)
    return found


def _filled(*models: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Models with defaults filled in, so that none and an equal number are the same; as they are if one is no model."""
    try:
        return tuple(filled(ModelShape.model_validate(model)) for model in models)
    except ValidationError:  # of another version
        return tuple(dict(model) for model in models)


def _compare(old: Any, new: Any, path: str, defaults: Mapping[str, Any]) -> list[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old and key in defaults)]:
            before, after = old.get(key, defaults.get(key, _ABSENT)), new.get(key, defaults.get(key, _ABSENT))
            if _ABSENT not in (before, after) or not defaults:
                found += _compare(before, after, f"{path}.{key}", {})
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [found for number, (one, other) in pairs for found in _compare(one, other, f"{path}.{number}", {})]
    return [] if old == new else [(path, old, new)]


def _text(value: Any) -> str:
    """A value for people, on one line and not endless."""
    if value is _ABSENT:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
