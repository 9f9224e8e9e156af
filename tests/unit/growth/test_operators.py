"""The registry as users see it: listed, documented, and extended in a few lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagrow.cli.checkpoint.operators import markdown
from megagrow.config import GrowthConfig
from megagrow.errors import GrowthError
from megagrow.growth.operators import registry
from megagrow.growth.operators.plan import plan_growth
from tests.unit.growth.test_growth import LARGE, LLAMA, SMALL, batch, grow, random_weights, relative, shape
from tools.reference.plain import logits_BSV

ROOT = Path(__file__).parents[3]


def test_the_guide_adds_an_exact_operator_in_under_15_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "adding_an_operator.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.setattr(registry, "_OPERATORS", dict(registry._OPERATORS))
    small, large = shape(SMALL, LLAMA), shape({**SMALL, "ffn_hidden_size": LARGE["ffn_hidden_size"]}, LLAMA)
    growth = GrowthConfig(ffn="keep_half")
    with pytest.raises(GrowthError, match="no operator 'keep_half'"):
        plan_growth(small, large, growth, seed=1)
    exec(compile(code, "adding_an_operator.md", "exec"), {})
    weights = random_weights(small)
    step = plan_growth(small, large, growth, seed=1)
    assert step.exact
    assert relative(logits_BSV(grow(weights, step), large, batch()), logits_BSV(weights, small, batch())) < 1e-13
    key = "decoder.layers.mlp.linear_fc2.weight"
    assert torch.equal(grow(weights, step)[key][..., :17], 0.5 * weights[key][..., :17])


def test_the_documentation_shows_the_registry_as_it_is() -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    shown = re.search(r"<!-- operators:begin -->\n(.*?)\n<!-- operators:end -->", page, re.DOTALL)
    assert shown is not None
    assert shown[1] == markdown(), "run: python -m tools.docs.operators_table"


def test_the_verb_lists_every_operator_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from megagrow.cli.main import main; main()"
    arguments = [sys.executable, "-c", program, "operators", "--json"]
    listed = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert {row["name"] for row in listed["rows"]} == {operator.name for operator in registry.operators()}
