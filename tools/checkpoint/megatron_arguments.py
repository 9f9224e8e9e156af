"""List the arguments of a Megatron-LM checkout, and fail on one that megagrow has not classified.

    python -m tools.checkpoint.megatron_arguments MEGATRON_LM [MEGATRON_LM ...]
    python -m tools.checkpoint.megatron_arguments MEGATRON_LM --defaults defaults.json

Megatron-LM saves all its arguments in every checkpoint, and builds a model from them by name. An argument that the
converter does not know may change what the model computes, so every one of them is in the table
(`megagrow/checkpoint/formats/megatron_common/known_arguments.py`): harmless, carried or refused.

Nothing of Megatron-LM is imported. Its sources are parsed, and five kinds of names are collected:

- the `add_argument` calls of `megatron/training` and `megatron/post_training`;
- the fields of the dataclasses from which newer versions generate arguments (`ArgumentGroupFactory`);
- the fields of the TransformerConfig and its like, which are taken from the arguments by name, generated or not;
- attributes that the training code assigns to `args`, which are saved with the rest;
- what `parse_args` finds in the environment, among those.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.megatron_common import classify_argument

PLACES = ("megatron/training/**/*.py", "megatron/post_training/**/*.py", "megatron/*.py")
"""Where arguments are added and changed; the last is where they were until 2024."""
CONFIGS = ("TransformerConfig", "MLATransformerConfig", "HeterogeneousTransformerConfig")
"""Dataclasses whose fields Megatron-LM takes from the arguments by name (`core_transformer_config_from_args`)."""
NOT_ARGUMENTS = ("self",)
UNKNOWN = "?"
"""Stands for a default that is not a plain value."""


@dataclass
class Arguments:
    """The arguments of one checkout.

    Attributes:
        parsed: defaults of the arguments that the parser has, by name.
        taken: further names that are read from, or written into, the saved arguments.
    """

    parsed: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.parsed, *self.taken})


def arguments_of_checkout(checkout: Path) -> Arguments:
    """Return the arguments of a checkout of Megatron-LM; SystemExit if it has no `megatron/training/arguments.py`."""
    if not list(checkout.glob("megatron/**/arguments.py")):
        raise SystemExit(f"{checkout}: no megatron/training/arguments.py: not a checkout of Megatron-LM")
    classes = {
        node.name: node
        for path in sorted((checkout / "megatron").rglob("*.py"))
        for node in _parsed(path).body
        if isinstance(node, ast.ClassDef)
    }
    result = Arguments()
    for place in PLACES:
        for path in sorted(checkout.glob(place)):
            for function in _functions(_parsed(path)):
                _read_function(function, classes, result)
    for name in CONFIGS:
        result.taken |= set(_fields(name, classes))
    return result


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def _read_function(function: ast.FunctionDef, classes: dict[str, ast.ClassDef], result: Arguments) -> None:
    """Add the arguments that one function adds, generates or assigns."""
    constants = {
        target.id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            if added := _added(node):
                result.parsed.setdefault(*added)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ArgumentGroupFactory":
            result.parsed |= _generated(node, classes, constants)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "args":
                result.taken.add(node.attr)


def _added(call: ast.Call) -> tuple[str, Any] | None:
    """Return the name and the default of an `add_argument` call; None if it has no literal flag."""
    given = {word.arg: word.value for word in call.keywords if word.arg}
    flags = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if not flags:
        return None
    long = next((flag for flag in flags if flag.startswith("--")), flags[0])
    name = str(_value(given["dest"])) if "dest" in given else long.lstrip("-").replace("-", "_")
    action = _value(given.get("action"))
    fallback = {"store_true": False, "store_false": True}.get(action) if isinstance(action, str) else None
    return name, _value(given["default"]) if "default" in given else fallback


def _generated(call: ast.Call, classes: dict[str, ast.ClassDef], constants: dict[str, ast.expr]) -> dict[str, Any]:
    """Return the arguments that `ArgumentGroupFactory(Config, exclude=[...])` generates, with their defaults."""
    excluded: ast.expr | None = next((word.value for word in call.keywords if word.arg == "exclude"), None)
    if isinstance(excluded, ast.Name):
        excluded = constants[excluded.id]
    without = set(_value(excluded) or ())
    config = call.args[0]
    if not isinstance(config, ast.Name) or config.id not in classes:
        return {}
    fields = _fields(config.id, classes)
    return dict(argument for name, argument in fields.items() if name not in without)


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, tuple[str, Any]]:
    """Return the fields of a dataclass and its bases: the name and the default of the argument made of each."""
    if name not in classes:
        return {}
    found: dict[str, tuple[str, Any]] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name):
            found |= _fields(base.id, classes)
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = _argument(node.target.id, node.value)
    return found


def _argument(name: str, node: ast.expr | None) -> tuple[str, Any]:
    """Return the name and the default of the argument that is made of a field, from its value or its `field(...)`."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "field"):
        return name, _value(node)
    given = {word.arg: word.value for word in node.keywords}
    meta = _value(given.get("metadata"))
    meta = meta.get("argparse_meta", {}) if isinstance(meta, dict) else {}
    factory = given.get("default_factory")
    if factory is None:
        default = _value(given.get("default"))
    elif isinstance(factory, ast.Lambda):
        default = _value(factory.body)
    else:
        default = {"list": [], "dict": {}}.get(getattr(factory, "id", ""), UNKNOWN)
    return meta.get("dest", name), meta.get("default", default)


def _value(node: ast.expr | None) -> Any:
    """Return a literal's value; for an expression that is none, UNKNOWN."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _recorded(found: Arguments) -> str:
    """Return the arguments as JSON, several on a line: defaults by name, and null for names without one."""
    values = found.parsed | dict.fromkeys(found.taken - found.parsed.keys())
    items = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(values.items())]
    lines = [""]
    for item in items:
        if len(lines[-1]) + len(item) > 115:
            lines.append("")
        lines[-1] += f"{item}, "
    return "{\n" + "\n".join(line.rstrip() for line in lines).rstrip(",") + "\n}\n"


def main() -> None:
    """Print the unclassified arguments of each checkout; exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--defaults", type=Path, help="write the first checkout's arguments and defaults, as JSON")
    options = parser.parse_args()
    unclassified = 0
    for number, checkout in enumerate(options.checkouts):
        found = arguments_of_checkout(checkout)
        if options.defaults is not None and number == 0:
            options.defaults.write_text(_recorded(found))
        missing = [name for name in found.names if classify_argument(name) is None]
        unclassified += len(missing)
        print(f"{checkout}: {len(found.names)} arguments, {len(missing)} of them not classified")
        for name in missing:
            print(f"  {name}  (default {found.parsed.get(name, UNKNOWN)!r})")
    sys.exit(unclassified > 0)


if __name__ == "__main__":
    main()
