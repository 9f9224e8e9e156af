"""Every example is a family that loads."""

from pathlib import Path

import pytest

from megagrow.config import load
from tools.docs.package_imports import ROOT

EXAMPLES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("family.yaml"))


def test_there_are_examples():
    assert Path("examples/demo/family.yaml") in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_an_example_loads(path):
    family = load(ROOT / path)
    assert len(family.stages) > 1, "a family has a stage to grow from and one to grow into"


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_an_example_points_editors_to_the_schema(path):
    first, _, _ = (ROOT / path).read_text(encoding="utf-8").partition("\n")
    marker = "# yaml-language-server: $schema="
    assert first.startswith(marker)
    assert ((ROOT / path).parent / first.removeprefix(marker).strip()).resolve() == ROOT / "schema/family.schema.json"
