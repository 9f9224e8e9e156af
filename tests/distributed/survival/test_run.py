"""Whole runs, disturbed as users disturb them: stopped, killed, and started again by the same command.

The result of an undisturbed family is computed in two starts of Megatron-Core (`quiet`). Every disturbed one, in
processes of its own, must end with its losses and its tensors to the last bit.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megagrow.config import load
from megagrow.config.paths import FamilyPaths
from megagrow.launch.local import INTERRUPTED
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP, WIDER, verb
from tests.distributed.ranks.launcher import run_ranks
from tools.proofs import kill_test

# generous: a test's time includes the fixtures that it is the first to need, on a machine that may be busy
pytestmark = pytest.mark.timeout(900)
STEPS = {"small": 30, "large": 30}
KILLS, SEED = 6, 20261122
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family.yaml of an undisturbed family of two stages, TP1 -> TP2."""
    root = tmp_path_factory.mktemp("run")
    tokens = {name: steps * TOKENS_PER_STEP for name, steps in STEPS.items()}
    small = families.stage("small", LLAMA, train_tokens=tokens["small"])
    large = families.stage("large", LLAMA | WIDER, "TP2", train_tokens=tokens["large"])
    file = families.write_family(root / "quiet", families.write_text(root / "text.jsonl"), [small, large])
    run_ranks("tests.distributed.survival.test_run:alone", 1, file)
    run_ranks("tests.distributed.survival.test_run:together", 2, file)
    return file


def alone(file: Path) -> None:
    """One rank's part of the undisturbed family."""
    for line in (["data", file], ["train", file, "--stage", "small"], ["convert", file, "--stage", "large"]):
        result = verb(*line)
        assert result.code == 0, result.text


def together(file: Path) -> None:
    """Two ranks' part of it."""
    result = verb("train", file, "--stage", "large")
    assert result.code == 0, result.text


@pytest.fixture(scope="module")
def bits(quiet: Path) -> dict[str, object]:
    """What the undisturbed family ended with."""
    found = kill_test.bits(load(quiet))
    assert len(found) == sum(STEPS.values()) + 4 + 4 + 2, "steps, validations and checkpoints"
    return found


def with_data_of(quiet: Path, name: str, *, grown: bool = False) -> tuple[Path, str]:
    """A directory with the data of the undisturbed family, and if wanted all up to its growth; (path, override)."""
    save, source = quiet.with_name(name), quiet.with_suffix("")
    families.lend(source / "data", save)
    if grown:
        shutil.copytree(source / "small", save / "small")
        shutil.copytree(source / "large" / "checkpoints" / "iter_0000000", save / "large/checkpoints/iter_0000000")
        (save / "large" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("0")
    return save, f"save={save}"


def start(*arguments: Any, ranks: int = 0) -> subprocess.Popen[str]:
    """Start `megagrow ARGUMENTS`, under our torchrun if on many ranks."""
    launcher = ["megagrow.runtime.torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "megagrow", *map(str, arguments)], text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def disturb(process: subprocess.Popen[str], ready: Callable[[], Any], act: Callable[[], Any]) -> str:
    """Do something to a process once it is ready for it; return all that it wrote until it left."""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.003)
        act()
        return process.communicate(timeout=PATIENCE_S)[0]
    finally:
        process.kill()


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a process that ends well."""
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, text


def stopped_at(save: Path, stage: str) -> int:
    """The iteration that a stopped stage has saved: the one of its last record, too."""
    tracker = (save / stage / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    checkpoint = save / stage / "checkpoints" / f"iter_{int(tracker):07d}"
    assert checkpoint.is_dir() and 0 < int(tracker) < STEPS[stage]
    return int(tracker)


def assert_bits(file: Path, override: str, wanted: dict[str, object], stage: str) -> None:
    """A stage ended with the bits of the undisturbed one."""
    found = kill_test.bits(load(file, [override]), only=stage)
    assert found == {key: value for key, value in wanted.items() if key.startswith(f"{stage} ")}


@pytest.mark.parametrize(("stage", "ranks", "number"), [("small", 0, signal.SIGTERM), ("large", 2, signal.SIGUSR1)])
def test_a_stopped_stage_saves_and_resumes(
    stage: str, ranks: int, number: int, quiet: Path, bits: dict[str, object]
) -> None:
    save, override = with_data_of(quiet, f"stopped-{stage}", grown=stage == "large")
    line = ("train", quiet, "--stage", stage, override)
    process = start(*line, ranks=ranks)
    text = disturb(process, lambda: steps(save, stage) >= 3, lambda: process.send_signal(number))
    assert process.returncode == 0 and f"after iteration {stopped_at(save, stage)}; saved" in text, text
    assert steps(save, stage) == stopped_at(save, stage)
    finish(start(*line, ranks=ranks))
    assert_bits(quiet, override, bits, stage)


def steps(save: Path, stage: str) -> int:
    """Number of recorded steps of a stage; polled often, so it only counts a substring."""
    path = save / stage / "records.jsonl"
    return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0


@pytest.fixture(scope="module")
def disturbed(quiet: Path) -> tuple[Path, str]:
    """The family that is disturbed: first it is stopped, then it is killed."""
    return with_data_of(quiet, "disturbed")


def test_a_stopped_run_reports_it(quiet: Path, disturbed: tuple[Path, str]) -> None:
    save, override = disturbed
    process = start("run", quiet, override)
    output = disturb(process, lambda: steps(save, "small") >= 3, lambda: process.send_signal(signal.SIGTERM))
    first = stopped_at(save, "small")
    assert process.returncode == INTERRUPTED and "train-small: stopped; run the same command to resume" in output, (
        output
    )

    process = start("run", quiet, override)

    def stop_the_trainer() -> None:
        for child in psutil.Process(process.pid).children():
            child.send_signal(signal.SIGUSR1)

    behind = disturb(process, lambda: steps(save, "small") >= first + 3, stop_the_trainer)
    assert process.returncode == INTERRUPTED and "stopped before its last step" in behind, behind
    assert stopped_at(save, "small") > first
    assert not FamilyPaths(load(quiet, [override])).stage(1).checkpoints.exists(), "it grew from half a stage"


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    quiet: Path, disturbed: tuple[Path, str], bits: dict[str, object]
) -> None:
    kills = kill_test.survive(quiet, [disturbed[1]], KILLS, SEED)
    # on a quick machine the family may be finished before its last kills
    assert len(kills) > KILLS // 2 and any(kill.processes for kill in kills)
    assert kill_test.bits(load(quiet, [disturbed[1]])) == bits
    kill_test.check_published(disturbed[0])


def test_a_damaged_parent_is_set_aside_and_its_last_steps_are_trained_again(
    quiet: Path, bits: dict[str, object]
) -> None:
    save, override = with_data_of(quiet, "damaged")
    shutil.copytree(quiet.with_suffix("") / "small", save / "small")
    last = save / "small" / "checkpoints" / f"iter_{STEPS['small']:07d}"
    victim = max(last.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    process = start("run", quiet, override)
    text = process.communicate(timeout=4 * PATIENCE_S)[0]
    assert process.returncode == 0, text
    assert f"{victim.name}: damaged" in text and "'small' is back at iteration 20" in text, text
    assert "convert-large: its damaged parent is set aside" in text, text
    assert last.with_name(last.name + ".refused").is_dir()
    assert kill_test.bits(load(quiet, [override])) == bits
