"""What a process holds that a pickle could reach by a name: two pictures of it show whether anything was altered."""

import enum
import sys
import types
from typing import Any

WATCHED = ("megagrow", "pathlib", "collections", "enum", "pickle", "builtins", "argparse", "signal", "copyreg", "os",
           "torch._utils", "torch._tensor", "torch.serialization", "torch.storage")  # fmt: skip
"""Packages, and modules, whose names are compared."""
UNSTEADY = {"_abc_impl", "__annotations__", "__weakref__", "__pydantic_core_schema__", "__doc__"}


def state_of_process() -> dict[str, Any]:
    """Return names and identities of modules' contents, of classes' attributes, and what belongs to functions."""
    found: dict[str, Any] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name in WATCHED or module_name.split(".")[0] in WATCHED:
            for name, value in list(vars(module).items()):
                found[f"{module_name}.{name}"] = id(value)
                found |= _inside(f"{module_name}.{name}", value)
    return found


def _inside(place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, types.FunctionType):
        return {f"{place}()": (id(value.__code__), repr(value.__defaults__), tuple(sorted(value.__dict__)))}
    if not isinstance(value, type):
        return {}
    found: dict[str, Any] = {f"{place}.{key}": id(each) for key, each in vars(value).items() if key not in UNSTEADY}
    if issubclass(value, enum.Enum):
        found |= {f"{place}.{member.name}()": tuple(sorted(vars(member))) for member in value}
    return found


def changes(before: dict[str, Any], after: dict[str, Any], canary: str) -> list[str]:
    """Return the names whose values are others than before, and new ones that are the canary."""
    changed = [name for name, value in before.items() if name in after and after[name] != value]
    return changed + [name for name in after if name not in before and canary in name]
