"""Where a family stands: one row a job, from the disk, the records and the queue.

The disk says what is done and how far a training is, the records how fast it goes and why it failed, the queue what
waits and why. On a machine without Slurm the queue is empty and the rest is still there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from megagrow import records
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.launch import slurm
from megagrow.launch.attempts import find_job, history, is_done, reached
from megagrow.launch.graph import Job
from megagrow.launch.slurm import Queued
from megagrow.launch.submit import in_queue
from megagrow.plan import family_plan
from megagrow.records import JobRecord, StepRecord

_RECENT = 50
_STATES = {"PENDING": "queued", "COMPLETING": "ending"}
_WAITS = {
    "Resources": "for free nodes",
    "Priority": "behind jobs of higher priority",
    "BeginTime": "for its next start",
    "JobHeldUser": "held: scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "for nodes that are down or reserved",
}


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job as it stands. Times are seconds since the epoch; None: not known, or not for this kind of job.

    Attributes:
        state: waiting (not in the queue), queued, running, ending, finished, failed, stopped; unknown without a queue.
        iteration: newest step on record; `checkpoint` is the iteration that a new start would begin from.
        ends: when training will have taken its last step at the present rate.
        why: why a job waits, failed or stopped.
    """

    job: str
    state: str
    job_id: str | None
    iteration: int | None
    iterations: int | None
    tokens_per_second: float | None
    ends: float | None
    checkpoint: int | None
    why: str


def family_status(family: Family, jobs: Sequence[Job]) -> tuple[list[JobStatus], str]:
    """Return the status of every job of a family, in their order, and a remark where the queue cannot be asked."""
    if not slurm.is_here():
        return [_status(family, job, jobs, None) for job in jobs], ""
    try:
        rows = in_queue(family, jobs)
    except LaunchError as error:
        return [_status(family, job, jobs, None) for job in jobs], f"The queue cannot be asked: {error}"
    return [_status(family, job, jobs, rows) for job in jobs], ""


def newest_log(family: Family, jobs: tuple[Job, ...], name: str) -> Path | None:
    """The log of a job's last submission; None where it has none. LaunchError for a job that there is not."""
    job = find_job(jobs, name)
    found = [
        path
        for path in FamilyPaths(family).jobs.glob(f"{job.name}-*.log")
        if path.stem.removeprefix(f"{job.name}-").isdecimal()
    ]
    return max(found, key=lambda path: int(path.stem.rpartition("-")[2]), default=None)


def _status(family: Family, job: Job, jobs: Sequence[Job], rows: dict[str, Queued] | None) -> JobStatus:
    """`rows` None: there is no queue."""
    row, past = (rows or {}).get(job.name), history(family, job)
    if is_done(family, job):
        state, why = "finished", ""
    elif row is not None:
        state = _STATES.get(row.state, row.state.lower())
        why = _waits_for(family, job, jobs, row) if state == "queued" else ""
    else:
        state, why = _out_of_queue(family, job, jobs, past, ask=rows is not None)
    iteration = iterations = None
    rate = ends = None
    if job.kind == "train" and job.stage is not None:
        iterations = family_plan(family).stages[job.stage].iterations
        steps = [r for r in records.read(FamilyPaths(family).stage(job.stage).records) if isinstance(r, StepRecord)]
        iteration = steps[-1].iteration if steps else reached(family, job)
        if state == "running":
            rate, ends = _pace(steps[-_RECENT:], iterations)
    return JobStatus(
        job=job.name,
        state=state,
        job_id=row.id if row else next((r.job_id for r in reversed(past) if r.job_id), None),
        iteration=iteration,
        iterations=iterations,
        tokens_per_second=rate,
        ends=ends,
        checkpoint=reached(family, job),
        why=why,
    )


def _pace(steps: Sequence[StepRecord], iterations: int) -> tuple[float | None, float | None]:
    """Tokens a second, and when the last step will be taken; validation and saves count as they came."""
    if len(steps) < 2:
        return None, None
    rate = median(step.tokens_per_second for step in steps)
    pauses = [after.time - before.time for before, after in pairwise(steps)]
    # a restart between two steps is no pace; a save between them is
    usual = median(pauses)
    spent = sum(min(pause, 20 * usual) for pause in pauses) / len(pauses)
    return rate, steps[-1].time + (iterations - steps[-1].iteration) * spent


def _waits_for(family: Family, job: Job, jobs: Sequence[Job], row: Queued) -> str:
    named = {one.name: one for one in jobs}
    needs = [name for name in job.needs if name in named and not is_done(family, named[name])]
    if row.reason == "Dependency":
        return f"waits for {', '.join(needs)}" if needs else "about to start"
    if row.is_lost:
        return "what it waited for has failed; `megagrow launch` submits it anew"
    words = next((text for reason, text in _WAITS.items() if row.reason.startswith(reason)), f"({row.reason})")
    when = "" if row.start in ("", "N/A") else f", about {row.start.replace('T', ' ')}"
    return f"{words if words.startswith('held') else 'waits ' + words}{when}"


def _out_of_queue(
    family: Family, job: Job, jobs: Sequence[Job], past: Sequence[JobRecord], *, ask: bool
) -> tuple[str, str]:
    """State and reason of a job that is neither done nor in the queue; `ask`: Slurm may know more."""
    if not past:
        before = [name for name in job.needs if not is_done(family, find_job(tuple(jobs), name))]
        return "waiting", f"for {', '.join(before)}" if before else "not submitted yet"
    last = past[-1]
    if last.event == "failed":
        return "failed", last.detail or f"exit code {last.exit_code}"
    if last.job_id is None:  # a job of `megagrow run`
        return ("running", "") if last.event == "started" else ("stopped", "`megagrow run` goes on")
    if not ask:
        return "unknown", f"was {last.event} as job {last.job_id}"
    return "stopped", f"{slurm.outcome(last.job_id) or 'left the queue'}; `megagrow launch` goes on"
