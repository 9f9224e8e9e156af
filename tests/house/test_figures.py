"""Figures in docs are those of the committed records."""

import json

from tools.benchmark.gpu import table
from tools.docs.package_imports import ROOT


def test_the_figures_of_the_gpu_are_those_that_were_recorded():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- gpu:begin -->")[2].partition("<!-- gpu:end -->")[0].strip()
    recorded = json.loads((ROOT / "docs" / "figures" / "gpu.json").read_text(encoding="utf-8"))
    assert shown == "| | |\n|---|---|\n" + table(recorded)


def test_a_resume_that_was_not_equal_is_told():
    recorded = json.loads((ROOT / "docs" / "figures" / "gpu.json").read_text(encoding="utf-8"))
    recorded["resume"]["losses equal bit for bit"] = False
    assert "NOT equal" in table(recorded)
