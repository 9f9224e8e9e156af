"""What keeps training alive, part by part: watchdog, time limit, numbers that are not finite, bare srun, records."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megagrow import records
from megagrow.config.stage import Training
from megagrow.errors import LaunchError, UserError
from megagrow.records import EvalRecord, RollBackRecord, StepRecord
from megagrow.runtime.process import describe_lost_rank
from megagrow.runtime.slurm import first_host, torchrun_variables
from megagrow.slurm_step import JOB_END_TIME
from megagrow.training.deadline import Deadline, exit_time
from megagrow.training.non_finite import TALLY_KEY, Tally, choose_action, limit_reached
from megagrow.training.watchdog import HUNG

STEP_OF_TASKS = {
    "SLURM_STEP_NUM_TASKS": "12", "SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_STEP_TASKS_PER_NODE": "4(x2),4", "SLURM_JOB_ID": "815",
    "SLURM_STEP_ID": "2",
}  # fmt: skip


def hang(wait: str, limit: float) -> subprocess.CompletedProcess[str]:
    """Run a process that starts `step 7` under a watchdog and then waits too long."""
    program = f"""
        import ctypes, threading, time
        from megagrow.training.watchdog import Watchdog
        dog = Watchdog({limit}, rank=3)
        dog.begin("loading", at_least=100)
        dog.begin("step 7")
        {wait}
        print("continued")
    """
    line = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_a_part_that_takes_too_long_ends_the_process_with_its_name_and_all_stacks() -> None:
    left = hang("threading.Event().wait()", 0.5)
    assert left.returncode == HUNG and left.stdout == ""
    assert "in wait" in left.stderr and 'File "<string>", line' in left.stderr
    last = left.stderr.splitlines()[-1]
    assert last.startswith("megagrow: error: rank 3: step 7 has not ended after ") and "=0.5" in last


def test_an_interpreter_that_is_held_ends_all_the_same() -> None:
    left = hang("ctypes.PyDLL(None).sleep(30)", 0.4)  # unlike CDLL, PyDLL keeps the interpreter's lock
    assert left.returncode and "continued" not in left.stdout and "Timeout" in left.stderr


@pytest.mark.parametrize(
    "wait", ["time.sleep(0.2)", "dog.close(); time.sleep(1.5)", "dog.begin('b', 9); time.sleep(1)"]
)
def test_what_ends_in_time_is_left_alone(wait: str) -> None:
    left = hang(wait, 0.5)
    assert left.returncode == 0 and left.stdout == "continued\n" and left.stderr == ""


def test_the_end_of_time_is_the_earlier_of_two() -> None:
    assert exit_time(None, 1000.0, {}) is None
    assert exit_time(None, 1000.0, {JOB_END_TIME: "Unknown"}) is None
    assert exit_time(2.0, 1000.0, {}) == 1120.0
    assert exit_time(None, 1000.0, {JOB_END_TIME: "5000"}) == 5000.0
    assert exit_time(2.0, 1000.0, {JOB_END_TIME: "5000"}) == 1120.0


@pytest.mark.parametrize("limit", [50, 75, 100, 201])
def test_no_step_is_started_that_could_not_finish(limit: float) -> None:
    """Steps of 7 to 9 s, a validation of 5 s every third, and a save of 11 s: all finish in time, little is wasted."""
    now, taken = 0.0, 0
    deadline = Deadline(limit, save=3.0, clock=lambda: now)
    stop = False
    while not stop:
        stop = not deadline.allows_another_step()
        step, validation = 7.0 + taken % 3, 5.0 if taken % 3 == 2 else 0.0
        now, taken = now + step + validation, taken + 1
        deadline.record_times(step=step, validation=validation or None)
        if stop or taken % 4 == 0:
            now += 11.0
            deadline.record_times(save=11.0)
    assert now <= limit, "it was still running when its time was up"
    assert limit - now < 2 * 1.25 * (2 * 9 + 5 + 11), "it exited far too early"


def test_without_a_limit_there_is_always_room_and_the_first_step_is_always_taken() -> None:
    assert Deadline(None, save=1e9).allows_another_step()
    late = Deadline(10.0, save=1.0, clock=lambda: 11.0)
    assert not late.allows_another_step()  # requests a stop, but only after the current step


def test_stop_skip_and_roll_back_have_their_limits() -> None:
    assert choose_action(Training(), Tally()) == ("stop", Tally())
    skip = Training(non_finite="skip", non_finite_limit=2)
    tally = Tally()
    for wanted in ("skip", "skip", "stop"):
        verdict, tally = choose_action(skip, tally)
        assert verdict == wanted
    assert choose_action(skip, tally.taken()) == ("skip", Tally(1, 0))
    back = Training(non_finite="roll_back", non_finite_limit=2)
    tally = Tally()
    for wanted in ("roll_back", "roll_back", "stop"):
        verdict, tally = choose_action(back, tally.taken())
        assert verdict == wanted
    assert limit_reached(Training()) == "" and "2 skipped" in limit_reached(skip) and "2 times" in limit_reached(back)


def test_a_tally_comes_back_from_a_checkpoint() -> None:
    assert Tally.from_common({"iteration": 4}) == Tally()
    assert Tally.from_common({TALLY_KEY: Tally(1, 2).to_dict()}) == Tally(1, 2)


def test_a_task_of_srun_finds_its_place() -> None:
    found = torchrun_variables(STEP_OF_TASKS)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "7", "WORLD_SIZE": "12", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07",
    }  # fmt: skip
    others = [torchrun_variables(STEP_OF_TASKS | {"SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(12)]
    assert set(others) == {str(port)} and 20000 <= port < 30000
    assert torchrun_variables(STEP_OF_TASKS | {"SLURM_STEP_ID": "3"})["MASTER_PORT"] != str(port)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "12", "SLURM_JOB_NODELIST": "gpu[07-09]"},  # a batch script
        STEP_OF_TASKS | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP_OF_TASKS | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun in a step
    ],
)
def test_nothing_is_added_where_there_is_no_step_of_ranks(environment: dict[str, str]) -> None:
    assert torchrun_variables(environment) == {}


def test_an_address_that_is_set_stays() -> None:
    found = torchrun_variables(STEP_OF_TASKS | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"})
    assert found["MASTER_ADDR"] == "10.0.0.1" and found["MASTER_PORT"] == "4711"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"), ("a1,a2", "a1"), ("n[1-3,7]", "n1"), ("n[07-12]", "n07"), ("n[5],m[1-2]", "n5"),
        ("r[1-2]n[04-09]", "r1n04"), ("a[01-12]-x.site", "a01-x.site"), ("tux-3.hpc", "tux-3.hpc"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[1-3]x]", "n[1-3", ",n1", "$(rm)"])
def test_no_host_is_an_error(nodes: str) -> None:
    with pytest.raises(LaunchError, match="SLURM_STEP_NODELIST"):
        torchrun_variables(STEP_OF_TASKS | {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": nodes})


def test_a_step_without_its_variables_is_an_error() -> None:
    with pytest.raises(LaunchError, match="SLURM_LOCALID=''"):
        torchrun_variables({name: value for name, value in STEP_OF_TASKS.items() if name != "SLURM_LOCALID"})


def test_a_lost_rank_is_distinguished_from_other_errors() -> None:
    gloo = "[/a/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]:3: Connection reset by peer. This is "
    assert describe_lost_rank(RuntimeError(gloo + "typically")) == "Read error [::1]:3: Connection reset by peer"
    assert describe_lost_rank(dist.DistBackendError("NCCL error: remote process exited\nmore")) == (
        "NCCL error: remote process exited"
    )
    assert describe_lost_rank(RuntimeError("The size of tensor a (3) must match")) is None


def step(iteration: int, **more: Any) -> StepRecord:
    return StepRecord(
        time=1.0, stage="a", iteration=iteration, loss=1.0, grad_norm=1.0, learning_rate=1e-3, consumed_samples=1,
        consumed_tokens=8, flops=1.0, tokens_per_second=1.0,
    ).model_copy(update=more)  # fmt: skip


def roll_back_record(iteration: int) -> RollBackRecord:
    return RollBackRecord(
        time=1.0, stage="a", iteration=iteration, bad_iteration=9, loss=math.nan, grad_norm=math.inf, passed_over=8,
        number=1,
    )  # fmt: skip


def test_a_roll_back_record_is_removed_only_when_the_roll_back_will_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"

    def left(iteration: int, *spare: type[records.Record]) -> list[tuple[str, int]]:
        path.unlink(missing_ok=True)
        for record in (step(3), roll_back_record(4), step(4), step(5, loss=math.nan, skipped=True)):
            records.append(path, record)
        records.rewind(path, iteration, spare)
        kept = [record for record in records.read(path) if isinstance(record, StepRecord | RollBackRecord)]
        return [(record.kind, record.iteration) for record in kept]

    assert left(3) == [("step", 3)]
    assert left(3, RollBackRecord) == [("step", 3), ("roll_back", 4)]
    assert left(4) == [("step", 3), ("roll_back", 4), ("step", 4)]
    assert len(left(5)) == 4
    *_, skipped = records.read(path)
    assert isinstance(skipped, StepRecord) and skipped.skipped and math.isnan(skipped.loss)


def test_a_record_that_does_not_fit_on_the_disk_is_an_error_and_none_is_lost_silently(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    program = f"""
        import resource, signal
        from pathlib import Path
        from megagrow import records
        from megagrow.records import EvalRecord
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        for iteration in range(20):
            records.append(Path({str(path)!r}), EvalRecord(
                time=1, stage="a", iteration=iteration, loss=1, samples=1, consumed_tokens=1, flops=1))
            print(iteration, flush=True)
    """
    left = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert left.returncode and "UserError" in left.stderr and "no records can be written here" in left.stderr
    kept = [record.iteration for record in records.read(path) if isinstance(record, EvalRecord)]
    assert kept == [int(line) for line in left.stdout.split()] != []


def test_a_record_in_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no records can be written"):
        records.append(tmp_path / "file" / "records.jsonl", step(1))
    assert os.listdir(tmp_path) == ["file"]
