"""The JSON schema of family.yaml, with which editors complete, describe and check keys as the user types.

It is generated from the classes that `load` validates with, so names, types and bounds always agree. It differs
from pydantic's own schema in one respect: `defaults` is merged into every stage before validation, so a stage may
omit everything but its name, and `defaults` accepts the keys of a stage. Rules between sections are not in the
schema; only `load` checks them.

    # yaml-language-server: $schema=../../schema/family.schema.json

as the first line of a family.yaml (a path relative to that file) enables it. `make schema` writes the file.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

from megagrow.config.family import Family, Stage

_REFERENCE = "#/$defs/"


def schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12) of a family.yaml before defaults are merged."""
    tree = Family.model_json_schema()
    sections = tree["$defs"]
    for name in _reachable(Stage.__name__, sections):
        sections[name].pop("required", None)
    defaults = copy.deepcopy(sections["Stage"])
    defaults |= {"title": "StageDefaults", "description": "Defaults for every stage; a stage's own keys win."}
    sections["StageDefaults"] = defaults
    sections["Stage"]["required"] = ["name"]
    tree["properties"]["defaults"] = {"$ref": _REFERENCE + "StageDefaults"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def schema_text() -> str:
    """Return the schema as text, as in schema/family.schema.json."""
    return json.dumps(schema(), indent=2) + "\n"


def _reachable(name: str, sections: dict[str, Any]) -> set[str]:
    """Names of a section and all sections nested in it."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _references(sections[name])
    return found


def _references(tree: Any) -> list[str]:
    """Names of the sections that part of a schema refers to."""
    if isinstance(tree, list):
        return [name for part in tree for name in _references(part)]
    if not isinstance(tree, dict):
        return []
    own = [tree["$ref"].removeprefix(_REFERENCE)] if isinstance(tree.get("$ref"), str) else []
    return own + [name for part in tree.values() for name in _references(part)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m megagrow.config.schema PATH")
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(schema_text(), encoding="utf-8")
