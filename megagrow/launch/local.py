"""Runs a family's jobs on this machine, one after the other, and resumes after a kill.

Every job is a process of its own (ranks run under torchrun), so one job leaves nothing in memory for the next. The
processes die with this one. A request to stop is passed on to them, and they save before they exit.
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
from megagrow.history import refuse_edits
from megagrow.launch.environment import environment
from megagrow.launch.graph import Job, is_finished
from megagrow.parent_death import die_with_parent
from megagrow.records import JobRecord

INTERRUPTED = 75
"""Exit code of a run that was asked to stop: the same command resumes it (EX_TEMPFAIL of sysexits.h)."""

_LOCK_WAIT_S = 0.5
"""`status` takes a lock for a moment, to see whether it is held."""

Announce = Callable[[str], None]
"""Shows the user one line about the progress of the jobs."""


def run_family(family: Family, jobs: Sequence[Job], announce: Announce) -> int:
    """Run the jobs that are not finished yet; return 0, the exit code of a job that failed, or INTERRUPTED.

    Args:
        family: the family that the jobs belong to.
        jobs: the jobs, in their order.
        announce: shows the user a line.

    Raises:
        LaunchError: another run is at work here, or a stage was made with other settings than the family has now.
    """
    refuse_edits(family)
    family.save.mkdir(parents=True, exist_ok=True)
    environment()  # asks other programs, which no request to stop should have to wait for: the answer is kept
    with family_lock(FamilyPaths(family).lock), _StopRequest() as stop:
        number, went_back = 0, False
        while number < len(jobs):
            job, number = jobs[number], number + 1
            label = f"[{number}/{len(jobs)}] {job.name}"
            if is_finished(family, job):
                announce(f"{label}: already finished")
                continue
            announce(f"{label}: {job.title}")
            code = _run_job(family, job, stop)
            if stop.requested:
                announce(f"{label}: stopped; run the same command to resume")
                return INTERRUPTED
            if code and job.kind == "convert" and not went_back and _has_unfinished_training(family, jobs[:number]):
                announce(f"{label}: its damaged parent is set aside; training the parent's last steps again")
                number, went_back = 0, True
                continue
            if code:
                announce(f"{label}: failed with exit code {code}")
                return code
            if job.kind == "train" and not is_finished(family, job):
                # someone else asked its ranks to stop; without this check the next stage would grow from half a stage
                announce(f"{label}: stopped before its last step; run the same command to resume")
                return INTERRUPTED
    return 0


def _has_unfinished_training(family: Family, jobs: Sequence[Job]) -> bool:
    """Whether a training among jobs that have already run is unfinished again."""
    return any(job.kind == "train" and not is_finished(family, job) for job in jobs)


class _StopRequest:
    """Catches requests to stop (SIGTERM, SIGINT, SIGUSR1) and passes them on to the running job."""

    def __init__(self) -> None:
        self.requested = False
        self.child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_StopRequest":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.child is not None:
            self.child.send_signal(signal.SIGUSR1)


def _run_job(family: Family, job: Job, stop: _StopRequest) -> int:
    """Run one job, record its start and its end, and return its exit code as a shell would."""
    path, started = FamilyPaths(family).records, time.time()
    records.append(path, JobRecord(time=started, job=job.name, event="started", environment=environment()))
    child = subprocess.Popen(command(job), env=_environment(job), preexec_fn=partial(die_with_parent, os.getpid()))
    stop.child = child
    code = child.wait()
    stop.child = None
    event = "interrupted" if stop.requested else "failed" if code else "finished"
    ended = time.time()
    record = JobRecord(time=ended, job=job.name, event=event, exit_code=code, seconds=ended - started)
    records.append(path, record)
    # the code of a child killed by signal n is -n; shells report 128 + n
    return code if code >= 0 else 128 - code


def command(job: Job) -> list[str]:
    """The command line that runs a job on this machine."""
    verb = ["-m", "megagrow", *job.arguments]
    if job.processes == 1:
        return [sys.executable, *verb]
    ranks = ["--standalone", "--nproc-per-node", str(job.processes)]
    return [sys.executable, "-m", "megagrow.runtime.torchrun", *ranks, *verb]


def _environment(job: Job) -> dict[str, str]:
    """The environment of a job: its ranks share the cores, unless the user has set OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // job.processes))
    return {"OMP_NUM_THREADS": threads, **os.environ}


@contextmanager
def family_lock(path: Path) -> Iterator[None]:
    """Hold the family's lock file; LaunchError if another run or launch holds it."""
    with open(path, "w") as stream:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"{path}: another `megagrow run` or `launch` is working on this family; wait for it or stop it"
                    ) from None
                time.sleep(0.05)
        yield
