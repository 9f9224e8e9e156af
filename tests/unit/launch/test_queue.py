"""Launch, status and the decisions of scripts, against a fake Slurm in a few lines of Python.

The same commands run against a real Slurm in tests/slurm.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagrow import records
from megagrow.config import Family, load
from megagrow.errors import LaunchError
from megagrow.history import StageHistory, current_settings
from megagrow.launch import attempts, slurm, submit
from megagrow.launch.attempts import Decision, decide_at_end, decide_at_start
from megagrow.launch.frozen import frozen_yaml
from megagrow.launch.graph import Job, family_jobs, job_history
from megagrow.launch.status import family_status, newest_log
from megagrow.records import ConversionRecord, JobRecord, StageRecord, StepRecord
from tests.unit.family.test_config import TREE

NAMES = ["data", "train-small", "convert-large", "verify-large", "train-large", "report"]


class FakeSlurm:
    """A queue in which jobs change only when a test changes them."""

    def __init__(self, partitions: dict[str, int]) -> None:
        self.jobs: dict[str, dict[str, str]] = {}
        self.partitions, self.tested, self.submitted, self.rejected_text = partitions, 0, 0, ""

    def __call__(self, line: list[str]) -> str:
        return getattr(self, f"_{line[0]}")(line[1:])

    def _sbatch(self, options: list[str]) -> str:
        text = Path(options[-1]).read_text()
        if options[0] == "--test-only":
            self.tested += 1
            if self.rejected_text and self.rejected_text in text:
                raise LaunchError("sbatch: allocation failure: Invalid account")
            return ""
        after = [option.partition("afterok:")[2] for option in options if "afterok" in option]
        number = str(100 + self.submitted)
        self.submitted += 1
        comment = next(line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH --comment"))
        waits = {"state": "PENDING", "reason": "Dependency"} if after else {"state": "RUNNING", "reason": "None"}
        self.jobs[number] = {**waits, "after": after[0] if after else "", "comment": comment}
        return f"{number}\n"

    def _squeue(self, options: list[str]) -> str:
        rows = []
        for number, job in self.jobs.items():
            behind = f"afterok:{job['after']}(unfulfilled)" if job["after"] else "(null)"
            rows.append("|".join([number, job["state"], job["comment"], str(Path.cwd()), "N/A", behind, job["reason"]]))
        return "\n".join(rows)

    def _scancel(self, options: list[str]) -> str:
        for number in options:
            del self.jobs[number]
        return ""

    def _sinfo(self, options: list[str]) -> str:
        return "\n".join(f"{name}|{count}|(null)" for name, count in self.partitions.items())

    def _scontrol(self, options: list[str]) -> str:
        if options[1] == "partition":
            default = dict.fromkeys(self.partitions, "NO") | {"main": "YES"}
            return "\n".join(
                f"PartitionName={name} Default={default[name]} TotalNodes={count} MaxTime=1-00:00:00"
                for name, count in self.partitions.items()
            )
        return "JobId=1 JobState=TIMEOUT Reason=None"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    one = FakeSlurm({"main": 2, "small": 1})
    monkeypatch.setattr(slurm, "_call", one)
    monkeypatch.setattr(slurm, "is_available", lambda: True)
    return one


def write(place: Path, **more: Any) -> Path:
    tree = {**TREE, "save": str(place / "save"), "budget": {"tokens_per_parameter": 1}, "cluster": {"retries": 1}}
    tree["stages"] = [{"name": "small", "train_tokens": 1280}, {"name": "large", "model": {"hidden_size": 24}}]
    (place / "family.yaml").write_text(yaml.safe_dump({**tree, **more}))
    return place / "family.yaml"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return load(write(tmp_path))


def launched(family: Family) -> tuple[list[str], list[str]]:
    """Names of the jobs that a launch submitted, and the lines that it showed."""
    shown: list[str] = []
    return list(submit.launch(family, shown.append)), shown


def job(family: Family, name: str) -> Job:
    return attempts.find_job(family_jobs(family, frozen_yaml(family)), name)


def train_to(family: Family, name: str, iteration: int, last: bool = False) -> None:
    """Write the files of a stage that has reached an iteration."""
    place = family.save / name
    (place / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True, exist_ok=True)
    (place / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    settings = current_settings(family, family.stage_index(name))
    history = StageHistory(state="training", iteration=iteration, tokens=0, flops=0.0, settings=settings)
    manifest = place / "checkpoints" / f"iter_{iteration:07d}" / "megagrow.json"
    manifest.write_text(json.dumps({"history": history.model_dump()}))
    if last:
        record = StageRecord(
            time=time.time(), stage=name, iterations=iteration, parameters=1, stage_tokens=1, consumed_tokens=1,
            flops=1.0, first_loss=1.0, final_loss=1.0, checkpoint="", seconds=1.0,
        )  # fmt: skip
        records.append(place / "records.jsonl", record)


# Submitting


def test_a_family_goes_into_the_queue_each_job_behind_the_one_it_needs(family: Family, fake: FakeSlurm) -> None:
    names, shown = launched(family)
    assert names == NAMES and fake.tested == len(NAMES)
    assert [one["after"] for one in fake.jobs.values()] == ["", "100", "101", "102", "103", "104"]
    assert shown[1] == "train-small: submitted as job 101, after data"
    submitted = [r for r in records.read(family.save / "records.jsonl") if isinstance(r, JobRecord)]
    assert [(r.job, r.event, r.job_id) for r in submitted][:1] == [("data", "submitted", "100")]
    for name in NAMES:
        text = (family.save / "jobs" / f"{name}.sbatch").read_text()
        assert f"{family.save}/jobs/family.yaml" in text, "the nodes read the family as it was launched"
    assert load(frozen_yaml(family)) == family


def test_submitting_twice_submits_nothing_twice(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    names, shown = launched(family)
    assert names == [] and shown[0] == "data: in the queue as job 100" and len(fake.jobs) == len(NAMES)


def test_finished_jobs_are_skipped(family: Family, fake: FakeSlurm) -> None:
    train_to(family, "small", 10, last=True)
    names, shown = launched(family)
    assert "train-small" not in names and "train-small: already finished" in shown
    assert fake.jobs["101"]["comment"].endswith("convert-large") and fake.jobs["101"]["after"] == ""


def test_jobs_whose_dependency_left_the_queue_are_submitted_again(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    del fake.jobs["101"]  # train-small was canceled, and the jobs that depend on it are still queued
    names, _ = launched(family)
    assert names == NAMES[1:] and "100" in fake.jobs and "102" not in fake.jobs
    numbers = list(fake.jobs)
    assert [fake.jobs[number]["after"] for number in numbers[1:]] == numbers[:-1]


def test_a_job_that_can_never_start_is_submitted_again(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    fake.jobs["105"]["reason"] = "DependencyNeverSatisfied"
    assert launched(family)[0] == ["report"]


def test_changed_requests_replace_waiting_jobs_but_not_running_ones(tmp_path: Path, fake: FakeSlurm) -> None:
    launched(load(write(tmp_path)))
    family = load(write(tmp_path, cluster={"retries": 1, "time": "01:00:00", "jobs": {"data": {"time": "04:00:00"}}}))
    assert launched(family)[0] == NAMES[1:] and len(fake.jobs) == len(NAMES)
    with pytest.raises(
        LaunchError, match=r"data is running as job 100 with other settings: `megagrow cancel FAMILY --job data`"
    ):
        launched(load(write(tmp_path, cluster={"time": "02:00:00"})))


def test_a_job_that_is_ending_stops_a_launch(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    fake.jobs["100"]["state"] = "COMPLETING"
    with pytest.raises(LaunchError, match=r"data \(job 100\) is just ending"):
        launched(family)


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"partition": "gpu"}, "data: no partition 'gpu' on this cluster: choose from main, small"),
        (
            {"gpus_per_node": 1},
            "train-small: requests 1 GPUs per node, but Slurm knows of at most 0 in a node of 'main'",
        ),
        ({"jobs": {"train": {"partition": "small"}}}, "needs 2 nodes of 1 ranks, but partition 'small' has 1"),
        ({"time": "25:00:00"}, "requests 25:00:00, but partition 'main' allows 1-00:00:00"),
        ({"container": {"runtime": "apptainer", "image": "/no.sif"}}, "image /no.sif does not exist"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused(
    tmp_path: Path, fake: FakeSlurm, cluster: dict[str, Any], words: str
) -> None:
    stages = [{"name": "wide", "train_tokens": 1280, "parallel": {"data_parallel_size": 2}}]
    if "gpus_per_node" in cluster:
        stages = [{"name": "small", "train_tokens": 1280}]
    with pytest.raises(LaunchError) as caught:
        launched(load(write(tmp_path, cluster=cluster, stages=stages)))
    assert words in str(caught.value) and fake.jobs == {}


def test_if_slurm_rejects_one_script_none_is_queued(family: Family, fake: FakeSlurm) -> None:
    fake.rejected_text = "report of the family"
    with pytest.raises(LaunchError, match="Invalid account"):
        launched(family)
    assert fake.jobs == {}


def test_jobs_are_canceled_last_first_or_by_name(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    assert submit.cancel(family, frozen_yaml(family), ["report"]) == {"report": "105"}
    assert list(submit.cancel(family, frozen_yaml(family), [])) == NAMES[:-1] and fake.jobs == {}
    with pytest.raises(LaunchError, match="no job 'x': choose from data, train-small"):
        submit.cancel(family, frozen_yaml(family), ["x"])


# Edits


def test_a_started_stage_may_change_how_it_runs_and_nothing_else(tmp_path: Path, fake: FakeSlurm) -> None:
    family = load(write(tmp_path))
    launched(family)
    fake.jobs.clear()
    stages = yaml.safe_load(write(tmp_path).read_text())["stages"]
    train_to(family, "small", 5)
    stages[0]["parallel"] = {"data_parallel_size": 2}
    family = load(write(tmp_path, stages=stages))
    launched(family)
    fake.jobs.clear()
    stages[0]["batch"] = {"global_batch_size": 4}
    with pytest.raises(LaunchError, match=r"stages.0 \('small'\) is at iteration 5 and .* batch\.global_batch_size"):
        launched(load(write(tmp_path, stages=stages)))
    del stages[0]["batch"]
    train_to(family, "small", 10, last=True)
    stages[0]["parallel"] = {}
    with pytest.raises(LaunchError, match=r"is finished and was trained with parallel\.data_parallel_size=2, not 1"):
        launched(load(write(tmp_path, stages=stages)))
    stages[0]["parallel"], stages[0]["cluster"] = {"data_parallel_size": 2}, {"time": "01:00:00"}
    stages[1]["schedule"] = {"max_lr": 1e-4}
    launched(load(write(tmp_path, stages=stages)))


def test_a_stage_that_was_never_launched_is_compared_with_its_checkpoint(family: Family, fake: FakeSlurm) -> None:
    train_to(family, "small", 10, last=True)
    manifest = family.save / "small" / "checkpoints" / "iter_0000010" / "megagrow.json"
    settings: dict[str, Any] = {"shape": {"hidden_size": 12}, "precision": "fp32", "layout": {}, "flops": 0}
    settings |= {"iteration": 10, "schedule": {"iterations": 10}}
    manifest.write_text(json.dumps(settings))
    with pytest.raises(LaunchError, match=r"was trained with model\.hidden_size=12, not 16"):
        launched(family)


# Decisions of a script


def test_decisions_at_the_start_and_the_end_of_a_job(family: Family) -> None:
    one = job(family, "data")
    assert decide_at_start(family, one)[0] is Decision.WORK
    (start,) = job_history(family, one)
    assert start.environment and start.environment["script"].endswith("jobs/data.sbatch")
    (family.save / "data").mkdir()
    (family.save / "data" / "prepared.json").write_text("{}")
    assert decide_at_end(family, one, 0)[0] is Decision.FINISHED
    assert decide_at_start(family, one)[0] is Decision.FINISHED, "a job that comes again has nothing to do"
    (family.save / "data" / "prepared.json").unlink()
    assert decide_at_start(family, one)[0] is Decision.WORK


def test_a_training_with_progress_is_repeated_whatever_its_exit_code(family: Family) -> None:
    one = job(family, "train-small")
    for iteration, code in ((2, 1), (4, 0), (6, 137), (8, 2)):
        assert decide_at_start(family, one)[0] is Decision.WORK
        train_to(family, "small", iteration)
        decision, why = decide_at_end(family, one, code)
        assert decision is Decision.AGAIN and f"(exit code {code}), at iteration {iteration}" in why
    decide_at_start(family, one)
    train_to(family, "small", 10, last=True)
    assert decide_at_end(family, one, 1)[0] is Decision.FINISHED, "the tracker decides, not the exit code"


def test_a_training_without_progress_fails_after_its_retries(family: Family) -> None:
    one = job(family, "train-small")
    train_to(family, "small", 4)
    assert decide_at_start(family, one)[0] is Decision.WORK and decide_at_end(family, one, 1)[0] is Decision.AGAIN
    assert decide_at_start(family, one)[0] is Decision.WORK
    decision, why = decide_at_end(family, one, 1)
    assert decision is Decision.FAILED and "2 attempt(s) made no progress, at iteration 4" in why
    assert decide_at_start(family, one)[0] is Decision.FAILED, "nor when Slurm requeues it"
    record = JobRecord(time=time.time(), job=one.name, event="submitted", job_id="7")
    records.append(family.save / "records.jsonl", record)
    assert decide_at_start(family, one)[0] is Decision.WORK, "the user launched it again"


@pytest.mark.parametrize("name", ["verify-large", "train-small"])
def test_a_user_error_without_progress_is_not_retried(family: Family, name: str) -> None:
    one = job(family, name)
    decide_at_start(family, one)
    assert decide_at_end(family, one, 2)[0] is Decision.FAILED
    records.append(family.save / "records.jsonl", JobRecord(time=1, job=name, event="submitted", job_id="7"))
    decide_at_start(family, one)
    assert decide_at_end(family, one, 137)[0] is Decision.AGAIN, "a lost node is not the user's error"


# Status


def by_name(family: Family) -> dict[str, Any]:
    return {one.job: one for one in family_status(family, family_jobs(family, frozen_yaml(family)))[0]}


def test_status_on_a_machine_without_slurm(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "is_available", lambda: False)
    rows = by_name(family)
    assert {row.state for row in rows.values()} == {"waiting"}
    assert rows["data"].why == "not submitted yet" and rows["report"].why == "for train-large"
    record = JobRecord(time=time.time(), job="data", event="submitted", job_id="7")
    records.append(family.save / "records.jsonl", record)
    assert by_name(family)["data"].why == "was submitted as job 7"


def test_status_where_slurm_does_not_answer(family: Family, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(family)

    def silent(line: list[str]) -> str:
        raise LaunchError("squeue did not respond")

    monkeypatch.setattr(slurm, "_call", silent)
    states, remark = family_status(family, family_jobs(family, frozen_yaml(family)))
    assert {state.state for state in states} == {"unknown"} and remark.endswith("squeue did not respond")


def test_status_shows_pace_and_reasons(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    fake.jobs["101"] |= {"state": "RUNNING", "reason": "None"}
    now = time.time()
    for iteration in range(1, 5):
        record = StepRecord(
            time=now + iteration, stage="small", iteration=iteration, loss=1.0, grad_norm=1.0, learning_rate=1.0,
            consumed_samples=1, consumed_tokens=1, flops=1.0, tokens_per_second=100.0 * iteration,
        )  # fmt: skip
        records.append(family.save / "small" / "records.jsonl", record)
    train_to(family, "small", 2)
    fake.jobs["100"] |= {"state": "PENDING", "reason": "Priority"}
    rows = by_name(family)
    train = rows["train-small"]
    assert (train.state, train.iteration, train.iterations, train.checkpoint) == ("running", 4, 10, 2)
    assert train.tokens_per_second == 250 and train.ends == pytest.approx(now + 10)
    assert rows["data"].why == "waits behind jobs of higher priority"
    assert rows["report"].why == "waits for train-large" and rows["report"].state == "queued"


def test_status_shows_how_a_job_ended(family: Family, fake: FakeSlurm) -> None:
    launched(family)
    decide_at_start(family, job(family, "data"))
    assert decide_at_end(family, job(family, "data"), 2)[0] is Decision.FAILED
    fake.jobs.clear()
    rows = by_name(family)
    assert rows["data"].state == "failed" and "fix the error in its log" in rows["data"].why
    assert rows["report"].state == "stopped" and rows["report"].why == "TIMEOUT; `megagrow launch` resumes it"


def test_the_report_is_done_until_a_stage_ends_after_it(family: Family) -> None:
    one = job(family, "report")
    (family.save).mkdir()
    (family.save / "report.html").write_text("")
    decide_at_start(family, one)
    decide_at_end(family, one, 0)
    assert attempts.is_done(family, one)
    train_to(family, "small", 10, last=True)
    assert not attempts.is_done(family, one)


def test_the_newest_log_is_the_last_submissions(family: Family) -> None:
    jobs = family_jobs(family, frozen_yaml(family))
    assert newest_log(family, jobs, "data") is None
    (family.save / "jobs").mkdir(parents=True)
    for name in ("data-9.log", "data-10.log", "data-x.log"):
        (family.save / "jobs" / name).write_text(name)
    assert newest_log(family, jobs, "data") == family.save / "jobs" / "data-10.log"


def test_a_conversion_of_a_stage_is_done_by_its_record(family: Family, fake: FakeSlurm) -> None:
    train_to(family, "small", 10, last=True)
    train_to(family, "large", 0)
    target = family.save / "large" / "checkpoints" / "iter_0000000"
    record = ConversionRecord(
        time=time.time(), source="x", target=str(target), operators={}, moments="exact", exact=True, tensors=1,
        bytes_read=1, bytes_written=1, seconds=1.0,
    )  # fmt: skip
    records.append(family.save / "records.jsonl", record)
    assert launched(family)[0] == ["data", "verify-large", "train-large", "report"]
