"""Run a family's jobs on this machine, one after the other, and go on where a kill left off.

Every job is a process of its own (ranks under torchrun), so nothing of one stage is in memory in the next. The
processes die with this one; a request to stop is handed on to them, and they save before they leave.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from megagrow import records
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.launch.graph import Job, is_finished
from megagrow.parent_death import die_with_parent
from megagrow.records import JobRecord

INTERRUPTED = 75
"""Exit code of a run that was asked to stop: the same command goes on (EX_TEMPFAIL of sysexits.h)."""

Tell = Callable[[str], None]


def run_family(family: Family, jobs: Sequence[Job], tell: Tell) -> int:
    """Run what is not finished yet; return 0, the exit code of a job that failed, or INTERRUPTED.

    Args:
        family: whose jobs they are.
        jobs: in their order.
        tell: shows a line to a person.
    """
    family.save.mkdir(parents=True, exist_ok=True)
    with alone(FamilyPaths(family).lock), _Stopper() as stopper:
        number, went_back = 0, False
        while number < len(jobs):
            job, number = jobs[number], number + 1
            place = f"[{number}/{len(jobs)}] {job.name}"
            if is_finished(family, job):
                tell(f"{place}: done before")
                continue
            tell(f"{place}: {job.title}")
            code = _run_job(family, job, stopper)
            if stopper.asked:
                tell(f"{place}: stopped; the same command goes on from here")
                return INTERRUPTED
            if code and job.kind == "convert" and not went_back and _is_reopened(family, jobs[:number]):
                tell(f"{place}: its parent was damaged and is set aside; its last steps are trained again")
                number, went_back = 0, True
                continue
            if code:
                tell(f"{place}: failed with exit code {code}")
                return code
            if job.kind == "train" and not is_finished(family, job):
                # somebody asked its ranks to stop, not us: nothing may grow from half a stage
                tell(f"{place}: stopped before its last step; the same command goes on from here")
                return INTERRUPTED
    return 0


def _is_reopened(family: Family, jobs: Sequence[Job]) -> bool:
    """Whether a training that was finished is so no more."""
    return any(job.kind == "train" and not is_finished(family, job) for job in jobs)


class _Stopper:
    """Hands a request to stop on to the job in hand."""

    def __init__(self) -> None:
        self.asked = False
        self.child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Stopper":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.child is not None:
            self.child.send_signal(signal.SIGUSR1)


def _run_job(family: Family, job: Job, stopper: _Stopper) -> int:
    path, begun = FamilyPaths(family).records, time.time()
    records.append(path, JobRecord(time=begun, job=job.name, event="started"))
    child = subprocess.Popen(command(job), env=_environment(job), preexec_fn=partial(die_with_parent, os.getpid()))
    stopper.child = child
    code = child.wait()
    stopper.child = None
    event = "interrupted" if stopper.asked else "failed" if code else "finished"
    ended = time.time()
    record = JobRecord(time=ended, job=job.name, event=event, exit_code=code, seconds=ended - begun)
    records.append(path, record)
    # a child that a signal killed has a negative code; 128 + n is what shells say
    return code if code >= 0 else 128 - code


def command(job: Job) -> list[str]:
    """The command line of a job on this machine."""
    verb = ["-m", "megagrow", *job.arguments]
    if job.processes == 1:
        return [sys.executable, *verb]
    ranks = ["--standalone", "--nproc-per-node", str(job.processes)]
    return [sys.executable, "-m", "megagrow.runtime.torchrun", *ranks, *verb]


def _environment(job: Job) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // job.processes))
    return {"OMP_NUM_THREADS": threads, **os.environ}


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the family's lock; LaunchError if another run or launch holds it."""
    with open(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LaunchError(f"{lock}: another `megagrow run` works on this family; wait for it or stop it") from None
        yield
