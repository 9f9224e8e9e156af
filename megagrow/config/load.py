"""Read a family.yaml: defaults under every stage, dotted overrides on top, errors that name place and value."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megagrow.config.family import Family, Stage
from megagrow.errors import ConfigError


def load(path: Path, overrides: Iterable[str] = ()) -> Family:
    """Return the checked family of a yaml file; ConfigError says what is wrong, where."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return load_text(text, overrides, where=str(path))


def load_text(text: str, overrides: Iterable[str] = (), where: str = "family") -> Family:
    """Return the checked family of a yaml text; overrides read `stages.1.schedule.max_lr=3e-4`."""
    try:
        tree = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where}: not valid yaml: {_one_line(error)}") from None
    plain = OmegaConf.to_container(tree)
    if not isinstance(plain, dict):
        raise ConfigError(f"{where}: not a family: the top level must be keys and values")
    named = {str(key): value for key, value in plain.items()}
    plain = _apply_overrides(_spread_defaults(named, where), overrides, where)
    try:
        return Family.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_explain(error, plain, where)) from None


def to_yaml(family: Family) -> str:
    """Return the whole family, defaults filled in, as yaml that `load_text` reads back to an equal one."""
    return yaml.safe_dump(family.model_dump(mode="json"), sort_keys=False, width=110)


def _spread_defaults(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Lay `defaults` under every stage; the stage's own keys win."""
    tree = dict(tree)
    defaults, stages = tree.pop("defaults", None), tree.get("stages")
    if not defaults or not isinstance(stages, list):
        return tree
    if not isinstance(defaults, Mapping):
        raise ConfigError(f"{where}: defaults must be keys and values, as in a stage")
    if unknown := sorted(set(defaults) - set(Stage.model_fields)):
        raise ConfigError(f"{where}: defaults.{unknown[0]}: unknown key{_nearest(str(unknown[0]), Stage.model_fields)}")
    merged = [OmegaConf.to_container(OmegaConf.merge(defaults, stage or {})) for stage in stages]
    return {**tree, "stages": merged}


def _apply_overrides(tree: dict[str, Any], overrides: Iterable[str], where: str) -> dict[str, Any]:
    config = OmegaConf.create(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: write it as key.key=value, e.g. stages.1.schedule.max_lr=3e-4")
        try:
            OmegaConf.update(config, key, yaml.safe_load(value), merge=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{where}: override {override!r} does not fit: {_one_line(error)}") from None
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _explain(error: ValidationError, tree: Mapping[str, Any], where: str) -> str:
    """One line for the first error: where it stands, what it says, and the nearest known key if it is unknown."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    count = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        return f"{where}: {place}: unknown key{_nearest(str(first['loc'][-1]), known)}{count}"
    if first["type"] == "missing":
        return f"{where}: {place}: missing{count}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], str | int | float | bool | None):
        message += f", not {first['input']!r}"
    return ": ".join(part for part in (where, place, message + count) if part)


def _nearest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at a location of the tree."""
    model: Any = Family
    for part in location:
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = _section_of(fields[part].annotation)
    return [*getattr(model, "model_fields", {})] + (["defaults"] if model is Family else [])


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = [_section_of(argument) for argument in get_args(annotation)]
    return next((section for section in sections if section is not None), None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
