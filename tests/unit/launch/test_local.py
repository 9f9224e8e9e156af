"""A family as jobs: their order, which are finished according to the disk, and the executor on one machine."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from megagrow import records
from megagrow.config import Family, load
from megagrow.errors import LaunchError
from megagrow.launch import local
from megagrow.launch.graph import Job, family_jobs, is_finished
from megagrow.launch.local import INTERRUPTED, command, run_family
from megagrow.plan import family_plan
from megagrow.records import ConversionRecord, JobRecord, StageRecord
from tests.unit.family.test_config import TREE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tree = {**TREE, "save": str(tmp_path / "save"), "budget": {"tokens_per_parameter": 1}}
    tree["stages"] = [
        {"name": "small", "train_tokens": 1280},
        {"name": "large", "model": {"hidden_size": 24}, "parallel": {"tensor_model_parallel_size": 2}},
    ]
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "family.yaml"


@pytest.fixture
def family(file: Path) -> Family:
    return load(file)


def job(name: str, *arguments: str, kind: str = "report", stage: int | None = None) -> Job:
    return Job(name, kind, stage, arguments, 1, (), f"the job {name}")  # type: ignore[arg-type]  # one of the literals


def named(family: Family, file: Path) -> dict[str, Job]:
    return {one.name: one for one in family_jobs(family, file)}


# Graph


def test_jobs_come_in_an_order_that_respects_what_they_need(family: Family, file: Path) -> None:
    jobs = family_jobs(family, file, ("seed=3",))
    names = [one.name for one in jobs]
    assert names == ["data", "train-small", "convert-large", "verify-large", "train-large", "report"]
    assert [one.needs for one in jobs] == [(), *[(name,) for name in names[:-1]]]
    assert [one.stage for one in jobs] == [None, 0, 1, 1, 1, None]
    assert [one.processes for one in jobs] == [1, 1, 1, 1, 2, 1]
    assert all(one.arguments[1:3] == (str(file), "seed=3") for one in jobs)
    assert all(one.arguments[0] == one.kind for one in jobs)
    assert all(
        one.arguments[3:] == (("--stage", one.name.split("-")[1]) if one.stage is not None else ()) for one in jobs
    )
    steps = family_plan(family).stages[0].iterations
    assert jobs[1].title == f"{steps} steps of 128 tokens, TP1, fp32" and "TP2" in jobs[2].title


def test_an_export_follows_its_training_and_no_job_waits_for_it(family: Family, file: Path) -> None:
    exporting = load(file, ["stages.0.export=huggingface", "stages.1.export=huggingface"])
    jobs = named(exporting, file)
    names = ["data", "train-small", "export-small", "convert-large", "verify-large", "train-large", "export-large"]
    assert list(jobs) == [*names, "report"]
    assert jobs["export-small"].needs == jobs["convert-large"].needs == ("train-small",)
    assert jobs["export-large"].needs == jobs["report"].needs == ("train-large",)
    line = ["convert", str(file), "--stage", "small", "--to", "huggingface", "--overwrite"]
    assert command(jobs["export-small"])[3:] == line


def test_command_lines_can_be_run_by_hand(family: Family, file: Path) -> None:
    jobs = named(family, file)
    megagrow = [sys.executable, "-m", "megagrow"]
    assert command(jobs["data"]) == [*megagrow, "data", str(file)]
    train = ["-m", "megagrow", "train", str(file), "--stage", "large"]
    assert command(jobs["train-large"])[1:3] == ["-m", "megagrow.runtime.torchrun"]
    assert command(jobs["train-large"])[3:] == ["--standalone", "--nproc-per-node", "2", *train]


# Finished jobs, read from disk


def track(family: Family, index: int, iteration: int) -> Path:
    save = family.save / family.stages[index].name / "checkpoints"
    path = save / f"iter_{iteration:07d}"
    path.mkdir(parents=True, exist_ok=True)
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def finish(family: Family, index: int, iterations: int) -> None:
    name = family.stages[index].name
    record = StageRecord(
        time=1, stage=name, iterations=iterations, parameters=1, stage_tokens=1, consumed_tokens=1, flops=1.0,
        first_loss=1.0, final_loss=1.0, checkpoint="", seconds=1.0,
    )  # fmt: skip
    records.append(family.save / name / "records.jsonl", record)


def convert(family: Family, target: Path, when: float) -> None:
    record = ConversionRecord(
        time=when, source="x", target=str(target), operators={}, moments="exact", exact=True, tensors=1,
        bytes_read=1, bytes_written=1, seconds=1.0,
    )  # fmt: skip
    records.append(family.save / "records.jsonl", record)


def verified(family: Family, when: float, event: str = "finished") -> None:
    records.append(family.save / "records.jsonl", JobRecord(time=when, job="verify-large", event=event))


def test_nothing_is_finished_on_an_empty_disk(family: Family, file: Path) -> None:
    assert not any(is_finished(family, one) for one in family_jobs(family, file))


def test_training_is_finished_by_its_last_checkpoint_and_its_record(family: Family, file: Path) -> None:
    train = named(family, file)["train-small"]
    wanted = family_plan(family).stages[0].iterations
    assert wanted == 10
    finish(family, 0, wanted)
    assert not is_finished(family, train)
    track(family, 0, wanted - 1)
    assert not is_finished(family, train)
    track(family, 0, wanted)
    assert is_finished(family, train)
    (family.save / "small" / "records.jsonl").unlink()
    assert not is_finished(family, train), "killed between its checkpoint and its record"


def test_conversion_and_verification_are_finished_until_their_checkpoint_changes(family: Family, file: Path) -> None:
    jobs = named(family, file)
    convert_job, verify_job = jobs["convert-large"], jobs["verify-large"]
    target = track(family, 1, 0)
    assert not is_finished(family, convert_job), "a checkpoint without a record of its conversion"
    convert(family, target, when=10)
    assert is_finished(family, convert_job) and not is_finished(family, verify_job)
    verified(family, 11, "failed")
    assert not is_finished(family, verify_job)
    verified(family, 12)
    assert is_finished(family, verify_job)
    convert(family, target, when=13)
    assert not is_finished(family, verify_job), "converted again since it was verified"
    verified(family, 14)
    target.rename(target.with_name("iter_0000000.refused"))
    assert not is_finished(family, convert_job) and not is_finished(family, verify_job)


def test_a_stage_that_trains_needs_no_conversion_any_more(family: Family, file: Path) -> None:
    track(family, 1, 5)
    jobs = named(family, file)
    assert is_finished(family, jobs["convert-large"]) and is_finished(family, jobs["verify-large"])
    assert not is_finished(family, jobs["train-large"])
    assert not is_finished(family, jobs["data"]) and not is_finished(family, jobs["report"])


def test_an_export_is_finished_until_its_stage_ends_again(family: Family, file: Path) -> None:
    exporting = load(file, ["stages.0.export=huggingface"])
    export = named(exporting, file)["export-small"]
    finish(exporting, 0, 10)
    done = JobRecord(time=0.5, job="export-small", event="finished")
    records.append(exporting.save / "records.jsonl", done)
    (exporting.save / "small" / "huggingface").mkdir()
    assert not is_finished(exporting, export), "from an earlier end of the stage"
    records.append(exporting.save / "records.jsonl", done.model_copy(update={"time": 2}))
    assert is_finished(exporting, export)
    (exporting.save / "small" / "huggingface").rmdir()
    assert not is_finished(exporting, export)


# The executor on this machine


def events(family: Family) -> list[tuple[str, str, int | None]]:
    read = records.read(family.save / "records.jsonl")
    return [(one.job, one.event, one.exit_code) for one in read if isinstance(one, JobRecord)]


def test_jobs_run_one_after_the_other_and_are_recorded(
    family: Family, file: Path, capfd: pytest.CaptureFixture
) -> None:
    shown: list[str] = []
    jobs = [job("plan", "plan", str(file), "--json"), job("help", "--help")]
    assert run_family(family, jobs, shown.append) == 0
    assert shown == ["[1/2] plan: the job plan", "[2/2] help: the job help"]
    output = capfd.readouterr().out
    assert output.index('"large"') < output.index("Usage")
    assert events(family) == [
        ("plan", "started", None), ("plan", "finished", 0), ("help", "started", None), ("help", "finished", 0),
    ]  # fmt: skip


def test_a_failure_stops_the_run_which_returns_its_exit_code(family: Family, file: Path) -> None:
    shown: list[str] = []
    jobs = [job("bad", "plan", str(file), "stages.0.nmae=x"), job("never", "plan", str(file))]
    assert run_family(family, jobs, shown.append) == 2
    assert shown[-1] == "[1/2] bad: failed with exit code 2" and len(shown) == 2
    assert events(family) == [("bad", "started", None), ("bad", "failed", 2)]
    assert run_family(family, [job("good", "--help")], shown.append) == 0, "the lock is free again"


def test_a_job_that_a_signal_kills_has_the_exit_code_of_a_shell(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(local, "command", lambda one: program)
    assert run_family(family, [job("killed")], lambda line: None) == 128 + 9
    assert events(family)[-1] == ("killed", "failed", -9)


def test_finished_jobs_are_skipped(family: Family, file: Path) -> None:
    track(family, 0, 10)
    finish(family, 0, 10)
    shown: list[str] = []
    assert run_family(family, [named(family, file)["train-small"]], shown.append) == 0
    assert shown == ["[1/1] train-small: already finished"] and events(family) == []


def test_no_stage_grows_from_an_unfinished_training(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "command", lambda one: [sys.executable, "-c", ""])
    shown: list[str] = []
    jobs = [job("train-small", kind="train", stage=0), job("convert-large", kind="convert", stage=1)]
    assert run_family(family, jobs, shown.append) == INTERRUPTED
    assert "stopped before its last step" in shown[-1] and len(shown) == 2


def test_a_request_to_stop_is_passed_on_as_a_request_to_save(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = family.save / "ready"
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(local, "command", lambda one: [sys.executable, "-c", program])

    def request_stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=request_stop, daemon=True).start()
    shown: list[str] = []
    assert run_family(family, [job("first"), job("second")], shown.append) == INTERRUPTED
    assert shown[-1] == "[1/2] first: stopped; run the same command to resume"
    assert events(family)[-1] == ("first", "interrupted", 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_run_is_rejected(family: Family, file: Path) -> None:
    family.save.mkdir(parents=True)
    with open(family.save / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="lock: another `megagrow run` or `launch` is working on this family"):
            run_family(family, [job("help", "--help")], lambda line: None)
        answer = subprocess.run([sys.executable, "-m", "megagrow", "run", str(file)], capture_output=True, text=True)
        assert answer.returncode == 2
        assert answer.stderr.startswith("megagrow: error: ") and answer.stderr.count("\n") == 1
    assert events(family) == []


def test_ranks_share_the_cores(family: Family, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    seen = {}
    for name, given in (("train-large", None), ("data", None), ("report", "3")):
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        environment = local._environment(named(family, file)[name])
        answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        seen[name] = json.loads(answer.stdout)["OMP_NUM_THREADS"]
    assert seen == {"train-large": "4", "data": "8", "report": "3"}
