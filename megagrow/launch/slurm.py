"""Slurm's own commands, typed: what they print becomes values, what they refuse one line.

Jobs are found by their comment, `megagrow:<save>:<job>`, which nobody renames, and by the directory that they were
submitted from where save is relative to it. Accounting may be missing on a cluster: then what became of a job is
known as long as slurmctld remembers it, some minutes.
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

_FIELDS = "%i|%T|%k|%Z|%S|%E|%r"
_MARK = "megagrow:"
_PATIENCE_S = 60.0
_LOST = ("DependencyNeverSatisfied",)


@dataclass(frozen=True)
class Queued:
    """A job in the queue. `state` and `reason` are Slurm's words; `start` is when it expects to start it, or N/A."""

    id: str
    state: str
    comment: str
    directory: str
    start: str
    dependency: str
    reason: str

    @property
    def is_lost(self) -> bool:
        """Whether it waits for what will never come."""
        return self.reason in _LOST


@dataclass(frozen=True)
class Partition:
    """A partition: its nodes, the most GPUs that one of them is known to have, and its time limit in words.

    Nodes that are powered up on demand may be hidden from users: then `gpus` is None.
    """

    name: str
    is_default: bool
    nodes: int
    gpus: int | None
    time: str


def comment(family: Family, job: str) -> str:
    """What tells a job of a family from all others, over all launches of it."""
    return f"{_MARK}{family.save}:{job}"


def job_of(family: Family, row: Queued) -> str | None:
    """The name of the family's job that an entry of the queue is; None for one that is not the family's."""
    save, _, name = row.comment.removeprefix(_MARK).rpartition(":")
    place = os.path.normpath(os.path.join(row.directory, save))
    mine = row.comment.startswith(_MARK) and place == os.path.normpath(family.save.absolute())
    return name if mine else None


def is_here() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def queue() -> tuple[Queued, ...]:
    """All jobs of this user in the queue."""
    lines = _run(["squeue", "--me", "--noheader", f"--format={_FIELDS}"]).splitlines()
    rows = [line.split("|", 6) for line in lines if line.count("|") >= 6]
    return tuple(Queued(*(field.strip() for field in row)) for row in rows)


def test(script: Path) -> None:
    """Let Slurm judge a script without queueing it; LaunchError says what it does not like."""
    _run(["sbatch", "--test-only", str(script)])


def submit(script: Path, after: Sequence[str]) -> str:
    """Put a script into the queue, behind other jobs' success; return its number."""
    behind = [f"--dependency=afterok:{':'.join(after)}"] if after else []
    answer = _run(["sbatch", "--parsable", *behind, str(script)])
    return answer.strip().partition(";")[0]  # a federation adds its cluster's name


def cancel(ids: Sequence[str]) -> None:
    """Take jobs from the queue; ranks that run get SIGTERM and Slurm's KillWait to save."""
    if ids:
        _run(["scancel", *ids])


def outcome(job_id: str) -> str | None:
    """How a job that left the queue ended, in Slurm's words (COMPLETED, TIMEOUT, CANCELLED, ...); None if forgotten."""
    try:
        shown = _run(["scontrol", "show", "job", "--oneliner", job_id])
        found = [word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")]
    except LaunchError:
        found = []
    if not found and shutil.which("sacct"):
        try:
            kept = _run(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}"])
            found = kept.split()[:1]
        except LaunchError:
            return None
    return found[0] if found else None


def partitions() -> dict[str, Partition]:
    """All partitions by name."""
    lines = [line.split("|", 2) for line in _run(["sinfo", "--noheader", "--format=%R|%D|%G"]).splitlines()]
    seen = [(name, int(count), _gpus(resources)) for name, count, resources in lines]
    found = {}
    for line in _run(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name, nodes = fields["PartitionName"], int(fields["TotalNodes"])
        mine = [(count, gpus) for partition, count, gpus in seen if partition == name]
        whole = sum(count for count, _ in mine) >= nodes
        most = max((gpus for _, gpus in mine), default=0) if whole else None
        found[name] = Partition(name, fields["Default"] == "YES", nodes, most, fields["MaxTime"])
    return found


def seconds(time: str) -> float:
    """Seconds of a time as Slurm writes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; UNLIMITED is infinite."""
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


def _gpus(resources: str) -> int:
    """GPUs of a node by Slurm's GRES text: `gpu:h100:8(S:0-1),nvme:1`."""
    count = 0
    for word in resources.split(","):
        if word.split(":")[0] == "gpu":
            last = word.partition("(")[0].rpartition(":")[2]
            count += int(last) if last.isdecimal() else 1
    return count


def _run(line: Sequence[str]) -> str:
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=_PATIENCE_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(
            f"{line[0]} is not on this machine: launch from a login node of the cluster, or look at the scripts with "
            "`megagrow launch FAMILY --dry-run`"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{line[0]} gave no answer in {_PATIENCE_S:g} s: is slurmctld up? (`scontrol ping`)"
        ) from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"{' '.join(line)}: {words}")
    return done.stdout
