"""Read a family.yaml: parse yaml, apply dotted overrides, merge defaults into stages, validate.

The order matters. Overrides are written into the parsed tree before `defaults` are merged into the stages, so that
`defaults.precision=fp32` reaches all stages and `stages.1.precision=bf16` still wins; validation comes last.
Every error is one line that names the key and the value.
"""

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megagrow.config.family import Family, Stage
from megagrow.errors import ConfigError

_EXAMPLE = "stages.1.schedule.max_lr=3e-4"


def load(path: Path, overrides: Iterable[str] = ()) -> Family:
    """Return the checked family of a yaml file; ConfigError names the key and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return load_text(text, overrides, where=str(path))


def load_text(text: str, overrides: Iterable[str] = (), where: str = "family") -> Family:
    """Return the checked family of a yaml text; an override is `stages.1.schedule.max_lr=3e-4`, for example."""
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid yaml: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: not a family: the top level must be a mapping of keys to values")
    for given in overrides:
        tree = apply_override(tree, given, where)
    plain = refuse_ambiguous(_merge_defaults(tree, where), where)
    try:
        return Family.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(first_error(error, where, Family)) from None


def to_yaml(family: Family) -> str:
    """Return the whole family, with defaults filled in, as yaml that `load_text` reads back as an equal family."""
    return yaml.safe_dump(family.model_dump(mode="json"), sort_keys=False, width=110)


_AMBIGUOUS = "!ambiguous"


class _Ambiguous(str):
    """A bare 1:40:00 or 0123: for yaml a number to the base of 60 or 8, for its author most likely text or a time."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e9 as a number (PyYAML reads it as text), and rejects duplicate keys and bare `on:`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag in ("tag:yaml.org,2002:bool", _AMBIGUOUS):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is not text for yaml: write it in quotes", key.start_mark
                )
            if key.tag != "tag:yaml.org,2002:merge" and str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_Loader.add_constructor(_AMBIGUOUS, lambda loader, node: _Ambiguous(node.value))
for _first in "-+0123456789":
    # before yaml's own rules, of which the first that fits decides
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(
        0, (_AMBIGUOUS, re.compile(r"^[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)$"))
    )


def refuse_ambiguous(tree: Any, where: str, path: tuple[str, ...] = ()) -> Any:
    """Return a parsed tree in which a bare 1:40:00 is text where a `time` is wanted.

    Raises:
        ConfigError: elsewhere, and for a bare 0123, with the key.
    """
    if isinstance(tree, dict):
        return {key: refuse_ambiguous(value, where, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, list):
        return [refuse_ambiguous(value, where, (*path, str(index))) for index, value in enumerate(tree)]
    if not isinstance(tree, _Ambiguous):
        return tree
    if path[-1:] == ("time",) and ":" in tree:
        return str(tree)
    number = yaml.safe_load(tree)
    reading = f"as the number {number}" if isinstance(number, int | float) else "as text in one version only"
    raise ConfigError(
        f"{where}: {'.'.join(path)}: yaml reads a bare {tree} {reading}: write text in quotes, and a number plainly"
    )


def _merge(under: Any, over: Any) -> Any:
    """Merge one tree over another: mappings merge key by key, anything else is replaced."""
    if not isinstance(under, Mapping) or not isinstance(over, Mapping):
        return over
    return {**under, **{key: _merge(under[key], value) if key in under else value for key, value in over.items()}}


def _merge_defaults(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Merge `defaults` into every stage; the stage's own keys win."""
    tree = dict(tree)
    defaults, stages = tree.pop("defaults", None), tree.get("stages")
    if defaults is None:
        return tree
    if not isinstance(defaults, Mapping):
        raise ConfigError(f"{where}: defaults must be a mapping with the keys of a stage, not {defaults!r}")
    if unknown := sorted(map(str, set(defaults) - set(Stage.model_fields))):
        raise ConfigError(f"{where}: defaults.{unknown[0]}: unknown key{_nearest(unknown[0], Stage.model_fields)}")
    if isinstance(stages, list):
        tree["stages"] = [_merge(defaults, {} if stage is None else stage) for stage in stages]
    return tree


def apply_override(tree: dict[str, Any], given: str, where: str, example: str = _EXAMPLE) -> dict[str, Any]:
    """Return a copy of a tree with one `key.key=value` written into it; ConfigError if it cannot be applied."""
    path, equals, text = given.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {given!r}: write it as key.key=value, such as {example}")
    try:
        written = _write(tree, keys, yaml.load(text, _Loader), "the family")
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: override {given!r} cannot be applied: {_one_line(error)}") from None
    assert isinstance(written, dict)
    return written


def _write(tree: Any, keys: list[str], value: Any, path: str) -> Any:
    """Return a copy of a tree with a value at a path.

    Only sections along the path are copied, so yaml aliases of them elsewhere keep their values. Missing sections are
    created. ValueError: the path leads through a plain value or past the end of a list.
    """
    if not keys:
        return _merge(tree, value)
    key, *rest = keys
    below = key if path == "the family" else f"{path}.{key}"
    if isinstance(tree, list):
        if not key.isdigit() or int(key) >= len(tree):
            raise ValueError(f"{path} has no entry {key}: its {len(tree)} entries are counted from 0")
        index = int(key)
        return [*tree[:index], _write(tree[index], rest, value, below), *tree[index + 1 :]]
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{path} is the value {tree!r} and has no key {key}")
    sections = tree or {}
    return {**sections, key: _write(sections.get(key), rest, value, below)}


def first_error(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    """Return one line for the first error: its key, the message, and the nearest known key for an unknown one."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    count = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(root, first["loc"][:-1])
        return f"{where}: {path}: unknown key{_nearest(str(first['loc'][-1]), known)}{count}"
    if first["type"] == "missing":
        return f"{where}: {path}: missing{count}"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], str | int | float | bool | date | None):
        message += f", not {str(first['input']) if isinstance(first['input'], date) else repr(first['input'])}"
    if first["type"] == "string_type" and isinstance(first["input"], int | float | date):
        message += ": write it in quotes"
    return ": ".join(part for part in (where, path, message + count) if part)


def _nearest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}"


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at a location in the tree."""
    model: Any = root
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
