"""A package that is missing gives one line that says what installs it, not a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagrow import extras

ROOT = Path(__file__).parents[3]
DEMO = "examples/demo/family.yaml"


def run_without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run megagrow where a package cannot be found."""
    program = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{package}":
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Hidden())
from megagrow.cli.main import main
main()
"""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", [["data"], ["train", "--stage", "small"]])
def test_what_needs_megatron_core_says_so_where_it_is_missing(tmp_path: Path, verb: list[str]) -> None:
    answer = run_without("megatron", verb[0], DEMO, *verb[1:], f"save={tmp_path / 'save'}")
    assert answer.returncode == 2, answer.stderr
    assert "megatron-core, which is not installed here: pip install 'megagrow'" in " ".join(answer.stderr.split())
    assert "Traceback" not in answer.stderr


def test_a_plan_needs_no_megatron_core() -> None:
    answer = run_without("megatron", "plan", DEMO)
    assert answer.returncode == 0, answer.stderr


def test_a_package_that_nobody_has_is_not_installed() -> None:
    assert not extras.is_installed("a_package_that_nobody_has")
    assert extras.is_installed("megagrow")


@pytest.mark.parametrize("target", sorted(set(extras.INSTALL.values()) - {"megagrow"}))
def test_every_extra_that_is_named_exists(target: str) -> None:
    name = target.removeprefix("megagrow[").removesuffix("]")
    assert f'"{name}": [' in (ROOT / "setup.py").read_text()
