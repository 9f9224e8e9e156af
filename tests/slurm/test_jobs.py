"""Single jobs on a real Slurm: rejected jobs, jobs that give up, and jobs that continue under another number."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagrow.records import JobRecord, read
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP, WIDER
from tests.slurm.conftest import ROOT
from tests.slurm.login_node import (
    job_field,
    log,
    megagrow,
    number,
    queue,
    save_of,
    settled,
    slurm_command,
    status,
    until,
    write_family,
)

pytestmark = [pytest.mark.timeout(3600), pytest.mark.usefixtures("slurm")]
STAGES = [
    families.stage("small", LLAMA, "DP2", train_tokens=10 * TOKENS_PER_STEP),
    families.stage("large", LLAMA | WIDER, "TP2", train_tokens=10 * TOKENS_PER_STEP),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that cannot start a training; every other job works."""
    path = tmp_path_factory.mktemp("broken") / "python"
    path.write_text(f'#!/bin/sh\ncase "$*" in *torchrun*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def write(directory: Path, name: str, **cluster: object) -> Path:
    text = directory / "text.jsonl"
    if not text.exists():
        families.write_text(text)
    return write_family(directory / name, text, STAGES, **cluster)


def test_slurm_accepts_every_script_of_the_example() -> None:
    found = sorted((ROOT / "examples/llama_1b_to_8b/slurm").glob("*.sbatch"))
    assert len(found) == 16
    for script in found:
        done = subprocess.run(["sbatch", "--test-only", script], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "to start at" in done.stderr, f"{script}: {done.stderr}"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("cluster.partition=nowhere", "no partition 'nowhere' on this cluster: choose from cpu, gpu, main, single"),
        ("cluster.gpus_per_node=1", "requests 1 GPUs per node, but Slurm knows of at most 0 in a node of 'main'"),
        ("stages.1.parallel.data_parallel_size=4", "needs 8 nodes of 1 ranks, but partition 'main' has 2"),
        ("cluster.memory=300K", "weights, gradients and optimizer need"),
        ("cluster.time='02:00:00'", "requests 02:00:00, but partition 'main' allows 01:00:00, so it would wait"),
        ("cluster.cpus_per_task=64", "sbatch --test-only"),
        ("data.sources.0.paths=[/no/such.jsonl]", "/no/such.jsonl"),
        ("stages.0.model.num_layers=x", "stages.0.model.num_layers"),
    ],
)
def test_what_can_never_succeed_is_refused_before_it_is_queued(tmp_path: Path, edit: str, words: str) -> None:
    file = write(tmp_path, "family")
    output = megagrow("launch", file, edit, code=2)
    assert words in output and output.startswith("megagrow: error: ") and output.count("\n") == 1
    assert not queue(file) and not list(tmp_path.glob("family/jobs/*.log"))


def test_a_training_that_never_starts_gives_up_and_its_family_waits(tmp_path: Path, broken: Path) -> None:
    file = write(tmp_path, "family", python=str(broken), retries=1)
    megagrow("launch", file)
    job = number(file, "train-small")
    until(lambda: job_field(job, "Restarts") == "1", file, "a second attempt")
    settled(file)
    rows = status(file)
    assert rows["data"]["state"] == "finished" and rows["train-small"]["state"] == "failed", log(file, "train-small")
    assert "2 attempt(s) made no progress" in rows["train-small"]["why"]
    assert {rows[name]["state"] for name in ("convert-large", "report")} == {"stopped"}
    records = [r for r in read(save_of(file) / "records.jsonl") if isinstance(r, JobRecord) and r.job == "train-small"]
    assert [r.event for r in records] == ["submitted", "started", "interrupted", "started", "failed"]
    assert {r.job_id for r in records} == {job}
    assert "2 attempt(s) made no progress" in megagrow("logs", file, "train-small")


def test_where_no_job_is_requeued_a_successor_takes_its_place(tmp_path: Path, broken: Path) -> None:
    file = write(tmp_path, "family", python=str(broken), retries=1, requeue=False)
    megagrow("launch", file)
    first, waiting = number(file, "train-small"), number(file, "convert-large")

    def dependency() -> str:
        return slurm_command("squeue", "--noheader", "--format=%E", f"--jobs={waiting}")

    until(lambda: f":{first}(" not in dependency(), file, "the waiting job depends on the successor")
    assert number(file, "train-small") != first and dependency().startswith("afterok:")
    settled(file)
    assert job_field(first, "ExitCode") == "75:0" and job_field(waiting, "JobState") == "CANCELLED"
    assert status(file)["train-small"]["state"] == "failed"
    assert len(list((save_of(file) / "jobs").glob("train-small-*.log"))) == 2


def test_a_family_is_canceled_as_a_whole(tmp_path: Path, broken: Path) -> None:
    file = write(tmp_path, "family", python=str(broken))
    megagrow("launch", file)
    assert megagrow("cancel", file, "--job", "report").count("canceled") == 1
    output = megagrow("cancel", file)
    assert output.count("canceled") == 5 and output.startswith("data: job ")
    settled(file)
    assert megagrow("cancel", file) == "none of its jobs is in the queue\n"
    assert {row["state"] for row in status(file).values()} == {"stopped"}
