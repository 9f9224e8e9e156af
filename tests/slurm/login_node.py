"""The actions of a user at a login node: run megagrow's and Slurm's commands, look, wait."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.ranks import families

TIMEOUT_S = 1200.0  # much more than an idle machine needs; a busy one may be ten times slower
CLUSTER = {
    "partition": "main",
    "time": "00:30:00",
    "ranks_per_node": 1,
    "convert_tasks": 2,
    "python": sys.executable,
    "setup": ["export MASTER_ADDR=127.0.0.1"],  # only Slurm knows the names n1 and n2
    "signal_before_seconds": 180,
    "retries": 3,
}


def megagrow(*arguments: Any, code: int = 0) -> str:
    """Run a verb in a process of its own; return its output, errors included."""
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def slurm_command(*line: Any) -> str:
    """Run a Slurm command and return its output; retry it, because munged may be too busy to answer."""
    for pause in (1, 5, 10, 0):
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300)
        if done.returncode == 0 or not pause:
            break
        time.sleep(pause)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout.strip()


def until(condition: Callable[[], Any], family: Path, description: str, pause: float = 0.5) -> Any:
    """Wait until a condition holds; AssertionError with queue and logs if it takes too long."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s: {description}\n{_queue_and_logs(family)}"
        time.sleep(pause)
    return result


def settled(family: Path) -> None:
    """Wait until no job of a family is in the queue."""
    until(lambda: not queue(family), family, "no job in the queue")


def status(family: Path) -> dict[str, dict[str, Any]]:
    """The rows of `megagrow status`, by job."""
    rows = json.loads(megagrow("status", family, "--json"))["rows"]
    return {row["job"]: row for row in rows}


def number(family: Path, job: str) -> str:
    """A job's number in the queue."""
    return queue(family)[job]


def queue(family: Path) -> dict[str, str]:
    """Numbers of a family's jobs in the queue, by name."""
    mark, rows = f"megagrow:{save_of(family)}:", slurm_command("squeue", "--noheader", "--format=%i|%k").splitlines()
    found = [row.split("|") for row in rows if f"|{mark}" in row]
    return {comment.removeprefix(mark): number_ for number_, comment in found}


def job_field(job: str, field: str) -> str:
    """A field of `scontrol show job`."""
    words = slurm_command("scontrol", "show", "job", "--oneliner", job).split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{field}="))


def steps(family: Path, stage: str) -> int:
    """The number of recorded steps of a stage; called often, so it only counts the word."""
    path = save_of(family) / stage / "records.jsonl"
    return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0


def saved(family: Path, stage: str) -> int:
    """The iteration of a stage's tracker; 0 without one."""
    path = save_of(family) / stage / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else 0


def log(family: Path, job: str) -> str:
    """All logs of a job, oldest first."""
    return "".join(path.read_text(errors="replace") for path in sorted((save_of(family) / "jobs").glob(f"{job}-*.log")))


def ranks(family: Path) -> dict[int, psutil.Process]:
    """The processes that train a family on this machine's nodes, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if str(save_of(family) / "jobs" / "family.yaml") not in (process.info["cmdline"] or []):
            continue
        try:
            parent, environment = process.parent(), process.environ()
            # the parent of a rank is torchrun; a process forked by a rank to write a checkpoint has the same arguments
            if "RANK" in environment and parent is not None and "megagrow.runtime.torchrun" in parent.cmdline():
                found[int(environment["RANK"])] = process
        except psutil.Error:
            continue
    return found


def tasks(family: Path, verb: str) -> list[psutil.Process]:
    """The tasks, except the first, of a job with several tasks that is not a training."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:4] != ["-m", "megagrow", verb] or str(save_of(family) / "jobs" / "family.yaml") not in line:
            continue
        try:
            if int(process.environ().get("SLURM_PROCID", 0)) > 0:
                found.append(process)
        except psutil.Error:
            continue
    return found


def save_of(family: Path) -> Path:
    """The save directory of a family from `families.write_family`."""
    return family.with_suffix("")


def _queue_and_logs(family: Path) -> str:
    logs = [
        f"--- {path.name}\n{path.read_text(errors='replace')[-2500:]}"
        for path in (save_of(family) / "jobs").glob("*.log")
    ]
    return "\n".join([slurm_command("squeue"), slurm_command("sinfo"), *logs])


def write_family(save: Path, text: Path, stages: list[dict[str, Any]], **cluster: Any) -> Path:
    """Write a tiny family with a cluster section; return its file."""
    rare = {"checkpoint": {"save_interval": 30, "keep": 9}, "evaluation": {"eval_interval": 30, "eval_samples": 24}}
    return families.write_family(save, text, stages, cluster={**CLUSTER, **cluster}, **rare)
