"""Typed wrappers of Slurm's commands: output becomes values, and an error becomes one line.

A job is identified by its comment, `megagrow:<save>:<job>`, which users do not change, and by the directory it was
submitted from if save is relative. On a cluster without accounting, the outcome of a job is known only as long as
slurmctld remembers it, some minutes.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.config import Family
from megagrow.errors import LaunchError

_SQUEUE_FORMAT = "%i|%T|%k|%Z|%S|%E|%r"
_COMMENT_PREFIX = "megagrow:"
_TIMEOUT_S = 60.0
_NEVER_STARTS = ("DependencyNeverSatisfied",)


@dataclass(frozen=True)
class Queued:
    """A job in the queue. `state` and `reason` are Slurm's terms; `start` is the expected start time, or N/A."""

    id: str
    state: str
    comment: str
    directory: str
    start: str
    dependency: str
    reason: str

    @property
    def can_never_start(self) -> bool:
        """Whether it depends on a job that has failed or was canceled."""
        return self.reason in _NEVER_STARTS


@dataclass(frozen=True)
class Partition:
    """A partition: its number of nodes, the most GPUs in one of them, and its time limit as Slurm writes it.

    `gpus` is None if some nodes are hidden from users, as nodes that are powered up on demand may be.
    """

    name: str
    is_default: bool
    nodes: int
    gpus: int | None
    time: str


def job_comment(family: Family, job: str) -> str:
    """The comment that identifies a job of a family, the same in every launch."""
    return f"{_COMMENT_PREFIX}{family.save}:{job}"


def job_of(family: Family, row: Queued) -> str | None:
    """The name of the family's job that a queue entry belongs to; None if it is not one of this family."""
    save, _, name = row.comment.removeprefix(_COMMENT_PREFIX).rpartition(":")
    directory = os.path.normpath(os.path.join(row.directory, save))
    is_ours = row.comment.startswith(_COMMENT_PREFIX) and directory == os.path.normpath(family.save.absolute())
    return name if is_ours else None


def is_available() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def queue() -> tuple[Queued, ...]:
    """All jobs of this user in the queue."""
    lines = _call(["squeue", "--me", "--noheader", f"--format={_SQUEUE_FORMAT}"]).splitlines()
    rows = [line.split("|", 6) for line in lines if line.count("|") >= 6]
    return tuple(Queued(*(field.strip() for field in row)) for row in rows)


def test_script(script: Path) -> None:
    """Let Slurm check a script without queueing it; LaunchError contains its objection."""
    _call(["sbatch", "--test-only", str(script)])


def submit(script: Path, after: Sequence[str]) -> str:
    """Queue a script to run after other jobs have succeeded; return its job number."""
    dependency = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    output = _call(["sbatch", "--parsable", *dependency, str(script)])
    return output.strip().partition(";")[0]  # in a federation the cluster's name follows


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; running ranks get SIGTERM and have Slurm's KillWait to save."""
    if ids:
        _call(["scancel", *ids])


def outcome(job_id: str) -> str | None:
    """How a job that left the queue ended, in Slurm's terms (COMPLETED, TIMEOUT, ...); None if Slurm has forgotten."""
    try:
        output = _call(["scontrol", "show", "job", "--oneliner", job_id])
        found = [word.partition("=")[2] for word in output.split() if word.startswith("JobState=")]
    except LaunchError:
        found = []
    if not found and shutil.which("sacct"):
        try:
            accounted = _call(
                ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"]
            )
            found = accounted.split()[:1]
        except LaunchError:
            return None
    return found[0] if found else None


def partitions() -> dict[str, Partition]:
    """All partitions by name."""
    lines = [line.split("|", 2) for line in _call(["sinfo", "--noheader", "--format=%R|%D|%G"]).splitlines()]
    nodes_by_partition = [(name, int(count), _gpus_in(gres)) for name, count, gres in lines]
    found = {}
    for line in _call(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name, nodes = fields["PartitionName"], int(fields["TotalNodes"])
        visible = [(count, gpus) for partition, count, gpus in nodes_by_partition if partition == name]
        all_visible = sum(count for count, _ in visible) >= nodes
        most = max((gpus for _, gpus in visible), default=0) if all_visible else None
        found[name] = Partition(name, fields["Default"] == "YES", nodes, most, fields["MaxTime"])
    return found


def parse_time_limit(time: str) -> float:
    """Convert a time in Slurm's notation to seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; UNLIMITED is infinite."""
    if not time[:1].isdecimal():
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, rest_seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, rest_seconds = parts
    else:
        hours, (minutes, rest_seconds) = 0, (*parts, 0)[:2]
    return 86400.0 * int(days or 0) + 3600 * hours + 60 * minutes + rest_seconds


def _gpus_in(gres: str) -> int:
    """The number of GPUs in a node's GRES text, e.g. `gpu:h100:8(S:0-1),nvme:1`."""
    count = 0
    for word in gres.split(","):
        if word.split(":")[0] == "gpu":
            last = word.partition("(")[0].rpartition(":")[2]
            count += int(last) if last.isdecimal() else 1
    return count


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} was not found: launch from a login node of the cluster, or print the scripts with "
            "`megagrow launch FAMILY --dry-run`"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{command[0]} did not respond within {_TIMEOUT_S:g} s: check slurmctld with `scontrol ping`"
        ) from None
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"{' '.join(command)}: {message}")
    return done.stdout
