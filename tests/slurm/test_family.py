"""A family on a real Slurm: launched, trained over two nodes, grown, verified, reported; then disturbed in all ways.

`quiet` is the family that nobody touched. The same family then meets, one after another, a time limit, a killed
rank, a node that goes down, a requeue and a canceled job. It must end with the losses and the tensors of the quiet
one, to the last bit.
"""

import json
import signal
from pathlib import Path

import psutil
import pytest

from megagrow.config import load
from megagrow.launch.slurm import seconds
from megagrow.records import JobRecord, read
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP, WIDER
from tests.slurm.person import (
    job_field,
    log,
    megagrow,
    number,
    queue,
    ranks,
    save_of,
    saved,
    say,
    settled,
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
    """What the quiet family ended with."""
    return kill_test.bits(load(quiet))


def test_a_launched_family_ends_finished_in_one_go(quiet: Path) -> None:
    rows = status(quiet)
    assert [(job, row["state"]) for job, row in rows.items()] == [(job, "finished") for job in JOBS], log(quiet, "data")
    assert rows["train-large"]["progress"] == "40/40" and rows["train-large"]["checkpoint"] == 40
    seen = events(quiet)
    assert [job for job, event in seen if event == "submitted"] == JOBS
    # export and report both wait for the last training only
    assert sorted(job for job, event in seen if event == "finished") == sorted(JOBS), seen
    assert [job for job, event in seen if event == "finished"][:5] == JOBS[:5], seen
    # on a slow machine a job may come near its time limit, save, and go on in the next start: nothing else may happen
    assert {event for _, event in seen} <= {"submitted", "started", "finished", "interrupted"}, seen
    assert megagrow("status", quiet, "--watch").count("finished") == len(JOBS), "watching ends when all is done"
    assert "report: " in log(quiet, "report") and (save_of(quiet) / "report.html").is_file()


def test_the_trained_stage_is_there_for_others_too(quiet: Path) -> None:
    seen = json.loads(megagrow("inspect", save_of(quiet) / "large" / "huggingface", "--json"))
    # transformers' Llama wants heads that divide hidden_size; Mistral is the same but for that
    assert seen["format"] == "Hugging Face (mistral)" and seen["shape"]["num_layers"] == WIDER["num_layers"]
    assert (save_of(quiet) / "large" / "huggingface" / "tokenizer.model").is_file()


def test_training_ran_on_two_nodes(quiet: Path) -> None:
    for job in ("train-small", "train-large"):
        assert job_field(rows_id(quiet, job), "NodeList") == "n[1-2]"


def events(family: Path) -> list[tuple[str, str]]:
    """What is on record of the jobs, in its order."""
    return [(r.job, r.event) for r in read(save_of(family) / "records.jsonl") if isinstance(r, JobRecord)]


def rows_id(family: Path, job: str) -> str:
    """The number of a job that is over, from its log."""
    (path,) = (save_of(family) / "jobs").glob(f"{job}-*.log")
    return path.stem.rpartition("-")[2]


def test_what_is_finished_is_not_submitted_again(quiet: Path) -> None:
    said = megagrow("launch", quiet)
    assert "0 job(s) submitted" in said and said.count("done before") == len(JOBS)
    assert not queue(quiet)


def test_an_edited_stage_that_is_finished_is_refused(quiet: Path) -> None:
    for edit, words in (
        ("stages.0.batch.micro_batch_size=4", "batch.micro_batch_size=2, not 4"),
        ("stages.1.schedule.max_lr=1e-3", "max_lr=0.003, not 0.001"),
        ("stages.0.train_tokens=25600", "iterations=90, not 100"),
    ):
        said = megagrow("launch", quiet, edit, code=2)
        assert words in said and "is finished" in said and said.count("\n") == 1
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
        # steps that a killed start took stay on record until the next one begins
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
    # Slurm looks at time limits twice a minute: hold the ranks so that they are not done before
    held = ranks(disturbed)
    for process in held.values():
        process.suspend()
    minutes = int(seconds(job_field(job, "RunTime")) // 60) + 3  # Slurm signals 180 s before
    say("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    until(lambda: all(is_told(process.pid) for process in held.values()), disturbed, "every rank got SIGUSR1")
    for process in held.values():
        process.resume()
    restarted(disturbed, job, 1)
    say("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    said = log(disturbed, "train-small")
    assert "SIGUSR1: finishing this step, saving, leaving" in said and "not finished (exit code 0)" in said
    assert saved(disturbed, "small") == steps(disturbed, "small") > 0


def is_told(pid: int) -> bool:
    """Whether SIGUSR1 waits for a process that does not run."""
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
    say("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    restarted(disturbed, job, 3)
    until(lambda: status(disturbed)["train-small"]["state"] == "queued", disturbed, "it waits for nodes")
    say("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_a_killed_task_of_the_converter_leaves_its_work_to_the_other(disturbed: Path) -> None:
    until(lambda: tasks(disturbed, "convert"), disturbed, "the converter starts", pause=0.02)[0].kill()
    until(lambda: ("convert-large", "finished") in events(disturbed), disturbed, "it is grown")
    assert [event for job, event in events(disturbed) if job == "convert-large"] == ["submitted", "started", "finished"]
    assert "convert-large: finished" in log(disturbed, "convert-large")


def test_a_requeue_sends_the_job_back(disturbed: Path) -> None:
    job = under_way(disturbed, "train-large")
    assert saved(disturbed, "small") == STEPS["small"]
    say("scontrol", "requeue", job)
    restarted(disturbed, job, 1)
    # Slurm counts the restart at once, while the ranks still save
    until(lambda: "train-large: not finished" in log(disturbed, "train-large"), disturbed, "its first start is over")
    # a rank may hear of it from Slurm (SIGTERM) or first from its torchrun (SIGUSR1)
    assert ": finishing this step, saving, leaving" in log(disturbed, "train-large")


def test_a_canceled_job_comes_back_by_another_launch(disturbed: Path) -> None:
    job = under_way(disturbed, "train-large")
    say("scancel", "--batch", "--signal=USR1", job)  # as near its time limit: still it must not come back by itself
    say("scancel", job)
    settled(disturbed)
    assert job_field(job, "JobState") == "CANCELLED" and job_field(job, "Restarts") == "1"
    rows = status(disturbed)
    assert {rows[job]["state"] for job in JOBS[-3:]} == {"stopped"}
    assert rows["train-large"]["why"] == "CANCELLED; `megagrow launch` goes on"
    said = megagrow("launch", disturbed)
    assert "3 job(s) submitted" in said and said.count("done before") == len(JOBS) - 3


def test_the_disturbed_family_ends_with_the_bits_of_the_quiet_one(disturbed: Path, bits: dict[str, object]) -> None:
    settled(disturbed)
    rows = status(disturbed)
    assert {row["state"] for row in rows.values()} == {"finished"}, log(disturbed, "train-large")
    assert kill_test.bits(load(disturbed)) == bits
