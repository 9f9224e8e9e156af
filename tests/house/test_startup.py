"""Asking for help, and everything else that needs no torch, is quick and stays without torch."""

import os
import subprocess
import sys

import pytest

from tools.docs.package_imports import ROOT, modules

LIMIT = 0.5  # CPU seconds, the best of five: the machine may be busy, the code may not be slow
LIGHT = ["errors", "log", "records", "config", "plan", "launch", "report", "cli.main"]
HEAVY = ("torch", "megatron", "matplotlib", "wandb", "sentencepiece")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the python of this test on the package as it is in the repository."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        begin = os.times()
        answer = _python("-m", "megagrow", "--help")
        end = os.times()
        seconds.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
        assert answer.returncode == 0, answer.stderr
        assert "Usage" in answer.stdout
    assert min(seconds) < LIMIT, [f"{value:.2f} s" for value in seconds]


def test_help_imports_nothing_heavy():
    answer = _python("-X", "importtime", "-m", "megagrow", "--help")
    assert answer.returncode == 0, answer.stderr
    modules = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if line.startswith("import time")}
    assert "megagrow" in modules
    assert sorted(module for module in modules if module.split(".")[0] in HEAVY) == []


@pytest.mark.parametrize("room", LIGHT)
def test_a_light_room_works_where_torch_is_not_installed(room):
    program = f"import sys; sys.modules.update(torch=None, megatron=None); import megagrow.{room}"
    answer = _python("-c", program)
    assert answer.returncode == 0, answer.stderr


def test_what_rooms_without_torch_hand_on_needs_no_torch():
    """`growth`, `checkpoint` and `convert` import torch only in modules that their `__init__` files leave alone."""
    packages = [f"megagrow.{room}" for room in ("growth", "checkpoint", "convert")]
    found = [name for name in modules() if name.startswith(tuple(packages)) and modules()[name].name == "__init__.py"]
    program = "import sys; sys.modules.update(torch=None, megatron=None)\n" + "".join(
        f"import {name}\n" for name in found
    )
    assert len(found) > 15
    answer = _python("-c", program)
    assert answer.returncode == 0, answer.stderr
