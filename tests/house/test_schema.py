"""The JSON schema for editors says what `megagrow.config` checks, and is the file in the repository."""

import json

from megagrow.config.family import Family, Stage
from megagrow.config.schema import schema, schema_text
from tools.docs.package_imports import ROOT

FILE = ROOT / "schema" / "family.schema.json"


def test_the_file_is_up_to_date():
    assert FILE.read_text(encoding="utf-8") == schema_text(), "run: make schema"


def test_defaults_has_all_keys_of_a_stage_and_needs_none():
    tree = json.loads(schema_text())
    defaults = tree["$defs"][tree["properties"]["defaults"]["$ref"].rpartition("/")[2]]
    assert set(defaults["properties"]) == set(Stage.model_fields)
    assert "required" not in defaults
    assert "defaults" not in tree["required"]


def test_a_stage_needs_only_its_name_since_defaults_may_give_the_rest():
    sections = schema()["$defs"]
    assert sections["Stage"]["required"] == ["name"]
    for name in ("ModelShape", "Batch", "ParallelLayout", "Schedule", "GrowthConfig"):
        assert "required" not in sections[name], name


def test_what_is_outside_of_stages_stays_required():
    tree = schema()
    assert set(tree["required"]) == {name for name, field in Family.model_fields.items() if field.is_required()}
    assert tree["$defs"]["Data"]["required"] == ["sources"]


def test_unknown_keys_are_refused_everywhere():
    tree = schema()
    sections = {"Family": tree, **tree["$defs"]}
    assert [name for name, section in sections.items() if section.get("additionalProperties") is not False] == []


def test_every_reference_leads_somewhere():
    text = schema_text()
    names = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert names and names <= set(schema()["$defs"])
