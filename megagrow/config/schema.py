"""The JSON schema of family.yaml, for editors: completion, descriptions and red lines while one types.

It is made from the same classes that `load` checks with, so it cannot disagree about names, types and bounds.
One thing differs from what pydantic generates: `defaults` is laid under every stage before anything is
checked, so a stage may leave out whatever it likes (but its name), and `defaults` has a stage's keys. Rules
between sections are not in it: `load` knows those.

    # yaml-language-server: $schema=../../schema/family.schema.json

as the first line of a family.yaml (the path is relative to that file) switches it on. `make schema` writes it.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

from megagrow.config.family import Family, Stage

_REFERENCE = "#/$defs/"


def schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12) of a family.yaml as its author writes it."""
    tree = Family.model_json_schema()
    sections = tree["$defs"]
    for name in _reachable(Stage.__name__, sections):
        sections[name].pop("required", None)
    defaults = copy.deepcopy(sections["Stage"])
    defaults |= {"title": "StageDefaults", "description": "Laid under every stage; the stage's own keys win."}
    sections["StageDefaults"] = defaults
    sections["Stage"]["required"] = ["name"]
    tree["properties"]["defaults"] = {"$ref": _REFERENCE + "StageDefaults"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def schema_text() -> str:
    """Return the schema as the text of schema/family.schema.json."""
    return json.dumps(schema(), indent=2) + "\n"


def _reachable(name: str, sections: dict[str, Any]) -> set[str]:
    """Names of a section and of all sections inside it."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _references(sections[name])
    return found


def _references(tree: Any) -> list[str]:
    """Names of the sections that a part of a schema refers to."""
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
