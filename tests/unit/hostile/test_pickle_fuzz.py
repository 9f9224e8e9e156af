"""The fuzzer: 200 cases are opened without a fault, and it notices weaknesses that are planted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module as a process of its own: a fork of this one would inherit the threads' locks."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


# issue 12: C10, C11, C13
def test_nothing_but_one_line_comes_of_200_forged_checkpoints() -> None:
    done = python("tools.fuzz.pickle_fuzz", "--cases", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 cases" in done.stdout and "Outcome" not in done.stdout


# issue 12: C10
@pytest.mark.parametrize(
    ("weakness", "end", "what"),
    [
        ("types", "a canary", "DType."),
        ("paths", "a canary", "pathlib.PurePosixPath.megagrow_canary"),
        ("unbounded", "too much memory", ""),
        ("unescaped", "an escape sequence", ""),
    ],
)
def test_a_planted_weakness_is_noticed(weakness: str, end: str, what: str) -> None:
    done = python("tests.unit.hostile.weakened", weakness)
    assert done.returncode == 0, done.stderr
    assert [found for found in json.loads(done.stdout) if found[0] == end and what in found[1]], done.stdout
