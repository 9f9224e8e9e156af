"""A package that is missing gives one line that says what installs it, not a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagrow import extras
from tools.reference.tiny_checkpoint import LARGE, random_state, shape, write_checkpoint

ROOT = Path(__file__).parents[3]
CONVERT = ROOT / ".venv" / "convert" / "bin"  # made by `make test`
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


def test_a_tracker_that_is_asked_for_and_missing_stops_the_training_before_it_begins(tmp_path: Path) -> None:
    verb = ["train", DEMO, "--stage", "small", "trackers.tensorboard=true", f"save={tmp_path / 'save'}"]
    answer = run_without("tensorboard", *verb)
    assert answer.returncode == 2, answer.stderr
    said = "trackers.tensorboard needs tensorboard, which is not installed here: pip install 'megagrow[tensorboard]'"
    assert said in " ".join(answer.stderr.split())
    assert not (tmp_path / "save").exists()


def test_a_plan_needs_no_megatron_core() -> None:
    answer = run_without("megatron", "plan", DEMO)
    assert answer.returncode == 0, answer.stderr


def test_a_package_that_nobody_has_is_not_installed() -> None:
    assert not extras.is_installed("a_package_that_nobody_has")
    assert extras.is_installed("megagrow")


@pytest.mark.parametrize("package", sorted(set(extras.INSTALL) - {"megatron"}))
def test_the_extra_that_is_named_brings_the_package(package: str) -> None:
    name = extras.INSTALL[package].removeprefix("megagrow[").removesuffix("]")
    (line,) = [line for line in (ROOT / "setup.py").read_text().splitlines() if f'"{name}": [' in line]
    assert f'"{package}>=' in line


def test_a_node_that_only_converts_needs_nothing_but_its_requirements(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    installed = run(CONVERT / "python", "-m", "pip", "freeze").lower()
    assert "torch==" in installed
    assert not any(f"{name}==" in installed for name in ("megatron-core", "wandb", "tensorboard", "matplotlib"))

    small = shape(LARGE)
    source = write_checkpoint(tmp_path / "source", small, random_state(small))
    megagrow, grown = CONVERT / "megagrow", tmp_path / "grown"
    assert "The family saves" in run(megagrow, "plan", ROOT / DEMO)
    assert "num_layers=3" in run(megagrow, "inspect", source)
    assert "exact" in run(megagrow, "convert", source, grown, "model.num_layers=6", "growth.layer=identity")
    assert "0 faults" in run(megagrow, "verify", grown)
    run(megagrow, "convert", grown, tmp_path / "split", "parallel.pipeline_model_parallel_size=2")
    assert "equal" in run(megagrow, "diff", grown, tmp_path / "split")


def test_the_requirements_of_that_node_are_the_versions_that_are_tested() -> None:
    pins, tested = (
        {line.strip() for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")}
        for name in ("requirements-convert.txt", "constraints.txt")
    )
    assert pins and pins <= tested
