"""The environment of a job: what is wrong in it is one line, what is left in it of another job does no harm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.training.command import megagrow, refused, write_family, write_pair

ROOT = Path(__file__).parents[3]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MEGAGROW_LOG", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    prefix = write_pair(tmp_path / "given", [[1, 2, 3, 4] * 8] * 20, np.uint16)
    file = write_family(tmp_path, {"prefix": str(prefix)})
    assert megagrow("data", file).code == 0
    return file


# issue 12: E23
@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "abc"), ("RANK", ""), ("RANK", "-1"), ("RANK", "²"), ("MEGAGROW_LOG", "LOUD"), ("MEGAGROW_LOG", "7")],
)
def test_a_wrong_variable_is_one_line_for_any_verb(family: Path, name: str, value: str) -> None:
    for verb in (("plan",), ("data",), ("train", "--stage", "a")):
        answer = megagrow(verb[0], family, *verb[1:], **{name: value})
        refused(answer, f"{name}={value!r}")
        assert answer.err.count("\n") == 1


# issue 12: E23
@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"WORLD_SIZE": ""}, ("WORLD_SIZE=''", "not a number")),
        ({"LOCAL_RANK": "x"}, ("LOCAL_RANK='x'", "not a number")),
        ({"OMP_NUM_THREADS": "two"}, ("OMP_NUM_THREADS='two'", "not a number")),
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE is 2", "MASTER_ADDR is not set", "torchrun")),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, ("MASTER_PORT is not set", "torchrun")),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": "29500"}, ("MASTER_ADDR is not set",)),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, ("MASTER_PORT='x'", "not a number")),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, ("MASTER_PORT='99999'", "no port")),
    ],
)
def test_a_wrong_rendezvous_is_one_line(
    family: Path, environment: dict[str, str], parts: tuple[str, ...], tmp_path: Path
) -> None:
    text = family.read_text().replace("name: a\n", "name: a\n  parallel: {data_parallel_size: 2}\n")
    family.write_text(text if environment.get("WORLD_SIZE") == "2" else family.read_text())
    refused(megagrow("train", family, "--stage", "a", **environment), *parts)


# issue 12: E23
def test_a_rank_outside_the_world_is_one_line(family: Path) -> None:
    """Every rank exits with the code; rank 0 alone prints, so this one logs its error nowhere."""
    from megagrow.errors import LaunchError
    from megagrow.runtime import process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        with pytest.raises(LaunchError, match="RANK 1 with WORLD_SIZE 1"):
            process.start()


# issue 12: E23
def test_one_process_needs_no_rendezvous(family: Path) -> None:
    """192.0.2.1 is an address that no machine has: what a shell of last week's job still has in its environment."""
    stale = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29511"}
    command = [sys.executable, "-m", "megagrow", "train", str(family), "--stage", "a"]
    environment = {**os.environ, **stale, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert megagrow("train", family, "--stage", "a", MASTER_ADDR=stale["MASTER_ADDR"]).code == 0


# issue 12: E23
def test_device_ranks_and_what_is_loaded_are_said_before_the_first_step(family: Path) -> None:
    answer = megagrow("train", family, "--stage", "a", CUDA_VISIBLE_DEVICES="")
    assert answer.code == 0, answer
    lines = [line.split(": ", 1)[1] for line in answer.err.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("stage a: 1 rank (TP1 PP1 CP1 DP1) on ")]
    loads = [
        number for number, line in enumerate(lines) if line == "stage a: loading its data, the model and new weights"
    ]
    steps = [number for number, line in enumerate(lines) if re.match(r"a \d+/4", line)]
    assert starts and loads and steps and starts[0] < loads[0] < steps[0], answer.err


# issue 12: E23
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", "0"), ("SLURM_JOB_GPUS", "0,1"), ("SLURM_GPUS_ON_NODE", "4")]
)
def test_a_job_that_asked_for_gpus_and_sees_none_stops(family: Path, name: str, value: str) -> None:
    answer = megagrow("train", family, "--stage", "a", **{name: value})
    refused(answer, "asked for GPUs", f"{name}={value}", "sees none", code=69)  # another node may have some: try again


# issue 12: E23
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "environment",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_GPUS": "0"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"SLURM_GPUS_ON_NODE": "0"},
    ],
)
def test_a_job_that_asked_for_none_trains_on_the_cpu(family: Path, environment: dict[str, str]) -> None:
    assert megagrow("train", family, "--stage", "a", **environment).code == 0
