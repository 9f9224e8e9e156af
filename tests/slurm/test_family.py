"""A family on a real Slurm: launched, trained on two nodes, grown, verified, reported; then the same with disturbances.

`quiet` is the undisturbed family. The same family then goes through a time limit, a killed rank, a node that goes
down, a requeue and a canceled job, one after another. It must end with the losses and the tensors of the quiet one, to
the last bit.
"""

import json
import signal
from pathlib import Path

import psutil
import pytest

from megagrow.config import load
from megagrow.launch.slurm import parse_time_limit
from megagrow.records import JobRecord, read
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP, WIDER
from tests.slurm.login_node import (
    job_field,
    log,
    megagrow,
    number,
    queue,
    ranks,
    save_of,
    saved,
    settled,
    slurm_command,
    status,
    steps,
    tasks,
    until,
    write_family,
)
from tools.proofs import kill_test

pytestmark = [pytest.mark.timeout(3600), pytest.mark.usefixtures("slurm")]
STEPS = {"small": 90, "large": 40}
JOBS = ["data", "train-small", "convert-large", "verify-large", "train-large", "export-large", "report"]


@pytest.fixture(scope="module")
def stages() -> list[dict]:
    small = families.stage("small", LLAMA, "DP2", train_tokens=STEPS["small"] * TOKENS_PER_STEP)
    large = families.stage(
        "large", LLAMA | WIDER, "TP2", train_tokens=STEPS["large"] * TOKENS_PER_STEP, export="huggingface"
    )
    return [small, large]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, stages: list[dict]) -> Path:
    """The family.yaml of a family that was launched and left alone."""
    root = tmp_path_factory.mktemp("family")
    file = write_family(root / "quiet", families.write_text(root / "text.jsonl"), stages)
    megagrow("launch", file)
    settled(file)
    return file


@pytest.fixture(scope="module")
def bits(quiet: Path) -> dict[str, object]:
    """The final losses and tensors of the quiet family."""
    return kill_test.bits(load(quiet))


def test_a_launched_family_ends_finished_in_one_go(quiet: Path) -> None:
    rows = status(quiet)
    assert [(job, row["state"]) for job, row in rows.items()] == [(job, "finished") for job in JOBS], log(quiet, "data")
    assert rows["train-large"]["progress"] == "40/40" and rows["train-large"]["checkpoint"] == 40
    found = events(quiet)
    assert [job for job, event in found if event == "submitted"] == JOBS
    # export and report both depend only on the last training
    assert sorted(job for job, event in found if event == "finished") == sorted(JOBS), found
    assert [job for job, event in found if event == "finished"][:5] == JOBS[:5], found
    # on a slow machine a job may reach its time limit, save, and resume in the next attempt: nothing else may happen
    assert {event for _, event in found} <= {"submitted", "started", "finished", "interrupted"}, found
    assert megagrow("status", quiet, "--watch").count("finished") == len(JOBS), "--watch ends with the last job"
    assert "report: " in log(quiet, "report") and (save_of(quiet) / "report.html").is_file()


def test_the_trained_stage_is_exported(quiet: Path) -> None:
    found = json.loads(megagrow("inspect", save_of(quiet) / "large" / "huggingface", "--json"))
    # transformers' Llama requires heads that divide hidden_size; Mistral is the same without that
    assert found["format"] == "Hugging Face (mistral)" and found["shape"]["num_layers"] == WIDER["num_layers"]
    assert (save_of(quiet) / "large" / "huggingface" / "tokenizer.model").is_file()


def test_training_ran_on_two_nodes(quiet: Path) -> None:
    for job in ("train-small", "train-large"):
        assert job_field(rows_id(quiet, job), "NodeList") == "n[1-2]"
        assert "\n0: " in log(quiet, job), "lines tell their node"


def test_each_start_tells_what_it_started_with(quiet: Path) -> None:
    starts = [r for r in read(save_of(quiet) / "records.jsonl") if isinstance(r, JobRecord) and r.event == "started"]
    assert {start.job for start in starts} == set(JOBS)
    for start in starts:
        assert start.environment is not None and Path(start.environment["script"]).name == f"{start.job}.sbatch"
        assert Path(start.environment["script"]).is_file() and start.environment["host"] and start.environment["torch"]


def events(family: Path) -> list[tuple[str, str]]:
    """The recorded events of the jobs, in order."""
    return [(r.job, r.event) for r in read(save_of(family) / "records.jsonl") if isinstance(r, JobRecord)]


def rows_id(family: Path, job: str) -> str:
    """The number of a job that has ended, from its log."""
    (path,) = (save_of(family) / "jobs").glob(f"{job}-*.log")
    return path.stem.rpartition("-")[2]


def test_what_is_finished_is_not_submitted_again(quiet: Path) -> None:
    output = megagrow("launch", quiet)
    assert "0 job(s) submitted" in output and output.count("already finished") == len(JOBS)
    assert not queue(quiet)


def test_an_edited_stage_that_is_finished_is_refused(quiet: Path) -> None:
    for edit, words in (
        ("stages.0.batch.micro_batch_size=4", "batch.micro_batch_size=2, not 4"),
        ("stages.1.schedule.max_lr=1e-3", "max_lr=0.003, not 0.001"),
        ("stages.0.train_tokens=25600", "iterations=90, not 100"),
    ):
        output = megagrow("launch", quiet, edit, code=2)
        assert words in output and "is finished" in output and output.count("\n") == 1
    assert not queue(quiet)


@pytest.fixture(scope="module")
def disturbed(quiet: Path, stages: list[dict]) -> Path:
    """The same family, launched twice in a row, with the data of the quiet one."""
    save = save_of(quiet).with_name("disturbed")
    file = write_family(save, quiet.with_name("text.jsonl"), stages)
    families.lend(save_of(quiet) / "data", save)
    first, second = megagrow("launch", file), megagrow("launch", file)
    assert f"{len(JOBS)} job(s) submitted" in first
    assert "0 job(s) submitted" in second and second.count("in the queue as job") >= len(JOBS) - 1
    assert [job for job, event in events(file) if event == "submitted"] == JOBS
    return file


def under_way(family: Path, job: str) -> str:
    """Wait until a job's ranks have taken three steps beyond their last checkpoint; return the job's number."""
    stage = job.removeprefix("train-")

    def moves() -> bool:
        if steps(family, stage) < saved(family, stage) + 3:
            return False
        # steps of a killed attempt stay on record until the next one starts
        written = (save_of(family) / stage / "records.jsonl").stat().st_mtime
        found = ranks(family).values()
        return len(found) == 2 and all(process.create_time() < written for process in found)

    until(moves, family, f"{stage} is under way", pause=0.02)
    return number(family, job)


def restarted(family: Path, number_: str, times: int) -> None:
    until(lambda: job_field(number_, "Restarts") == str(times), family, f"restart {times}")


def test_before_its_time_limit_a_job_saves_and_goes_back_into_the_queue(disturbed: Path) -> None:
    job = under_way(disturbed, "train-small")
    waits = status(disturbed)
    assert waits["convert-large"]["why"] == "waits for train-small" and waits["train-small"]["state"] == "running"
    # Slurm checks time limits twice a minute: suspend the ranks so that they do not finish first
    held = ranks(disturbed)
    for process in held.values():
        process.suspend()
    minutes = int(parse_time_limit(job_field(job, "RunTime")) // 60) + 3  # Slurm signals 180 s before
    slurm_command("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    until(lambda: all(has_pending_signal(process.pid) for process in held.values()), disturbed, "all ranks got SIGUSR1")
    for process in held.values():
        process.resume()
    restarted(disturbed, job, 1)
    slurm_command("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    output = log(disturbed, "train-small")
    assert "SIGUSR1: finishing this step, saving, leaving" in output and "not finished (exit code 0)" in output
    assert saved(disturbed, "small") == steps(disturbed, "small") > 0


def has_pending_signal(pid: int) -> bool:
    """Whether SIGUSR1 is pending for a suspended process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


def test_a_killed_rank_ends_the_step_everywhere_and_the_job_comes_back(disturbed: Path) -> None:
    job, before = under_way(disturbed, "train-small"), saved(disturbed, "small")
    found = ranks(disturbed)
    found[1].kill()
    restarted(disturbed, job, 2)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found.values())
    assert f", at iteration {saved(disturbed, 'small')}\n" in log(disturbed, "train-small")
    assert saved(disturbed, "small") >= before


def test_a_node_that_goes_down_sends_the_job_back(disturbed: Path) -> None:
    job = under_way(disturbed, "train-small")
    slurm_command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    restarted(disturbed, job, 3)
    until(lambda: status(disturbed)["train-small"]["state"] == "queued", disturbed, "the job waits for nodes")
    slurm_command("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_a_killed_task_of_the_converter_leaves_its_work_to_the_other(disturbed: Path) -> None:
    until(lambda: tasks(disturbed, "convert"), disturbed, "the converter starts", pause=0.02)[0].kill()
    until(lambda: ("convert-large", "finished") in events(disturbed), disturbed, "the conversion is finished")
    assert [event for job, event in events(disturbed) if job == "convert-large"] == ["submitted", "started", "finished"]
    assert "convert-large: finished" in log(disturbed, "convert-large")


def test_a_requeue_sends_the_job_back(disturbed: Path) -> None:
    job = under_way(disturbed, "train-large")
    assert saved(disturbed, "small") == STEPS["small"]
    slurm_command("scontrol", "requeue", job)
    restarted(disturbed, job, 1)
    # Slurm counts the restart at once, while the ranks are still saving
    until(
        lambda: "train-large: not finished" in log(disturbed, "train-large"), disturbed, "its first attempt has ended"
    )
    # a rank gets SIGTERM from Slurm or, earlier, SIGUSR1 from its torchrun
    assert ": finishing this step, saving, leaving" in log(disturbed, "train-large")


def test_a_canceled_job_comes_back_by_another_launch(disturbed: Path) -> None:
    job = under_way(disturbed, "train-large")
    # the signal of a near time limit: the job must not be requeued even then
    slurm_command("scancel", "--batch", "--signal=USR1", job)
    slurm_command("scancel", job)
    settled(disturbed)
    assert job_field(job, "JobState") == "CANCELLED" and job_field(job, "Restarts") == "1"
    rows = status(disturbed)
    assert {rows[job]["state"] for job in JOBS[-3:]} == {"stopped"}
    assert rows["train-large"]["why"] == "CANCELLED; `megagrow launch` resumes it"
    output = megagrow("launch", disturbed)
    assert "3 job(s) submitted" in output and output.count("already finished") == len(JOBS) - 3


def test_the_disturbed_family_ends_with_the_bits_of_the_quiet_one(disturbed: Path, bits: dict[str, object]) -> None:
    settled(disturbed)
    rows = status(disturbed)
    assert {row["state"] for row in rows.values()} == {"finished"}, log(disturbed, "train-large")
    assert kill_test.bits(load(disturbed)) == bits
