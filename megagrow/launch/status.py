"""The state of a family, one row per job, read from the disk, the records and the queue.

The disk shows which jobs are finished and how far a training is, the records how fast it is and why it failed, the
queue which jobs wait and why. Locks show which jobs of this machine run: a record of a start outlives its process, and
a stage that is trained by hand has none. On a machine without Slurm everything but the queue is still shown.
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
from megagrow.history import has_only_discarded_steps, is_held, refuse_edits
from megagrow.launch import slurm
from megagrow.launch.attempts import find_job, is_done, reached_iteration
from megagrow.launch.graph import Job, job_history
from megagrow.launch.slurm import Queued
from megagrow.launch.submit import in_queue
from megagrow.plan import family_plan
from megagrow.records import JobRecord, StepRecord

_RECENT = 50
_STATE_NAMES = {"PENDING": "queued", "COMPLETING": "ending"}
_WAIT_REASONS = {
    "Resources": "for free nodes",
    "Priority": "behind jobs of higher priority",
    "BeginTime": "for its next start",
    "JobHeldUser": "held: release it with `scontrol release`",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "for nodes that are down or reserved",
}


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """The present state of a job. Times are seconds since the epoch; None: unknown, or not for this kind of job.

    Attributes:
        state: waiting (not in the queue), queued, running, ending, finished, failed, stopped; unknown without a queue.
        iteration: the newest recorded step; `checkpoint` is the iteration that a new attempt would resume from.
        ends: when training will finish its last step at the present rate.
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
    """Return the status of every job of a family, in order, and a remark if the queue could not be read.

    Raises LaunchError if a stage was made with other settings than the family has now.
    """
    refuse_edits(family)
    if not slurm.is_available():
        return [_status(family, job, jobs, None) for job in jobs], ""
    try:
        rows = in_queue(family, jobs)
    except LaunchError as error:
        return [_status(family, job, jobs, None) for job in jobs], f"The queue could not be read: {error}"
    return [_status(family, job, jobs, rows) for job in jobs], ""


def set_aside_notes(family: Family) -> tuple[str, ...]:
    """A note for each stage that keeps iterations which training went back behind; they only take up space."""
    notes = []
    for index, stage in enumerate(family.stages):
        aside = FamilyPaths(family).stage(index).ahead
        numbers = sorted(name for path in aside.glob("iter_*") if (name := path.name.removeprefix("iter_")).isdecimal())
        if numbers:
            which = " to ".join(f"{int(number)}" for number in dict.fromkeys((numbers[0], numbers[-1])))
            notes.append(
                f"{stage.name}: {len(numbers)} checkpoint(s) at iteration {which} were ahead when training went back; "
                f"they are kept in {aside} and not used: remove it if you do not need them"
            )
    return tuple(notes)


def newest_log(family: Family, jobs: tuple[Job, ...], name: str) -> Path | None:
    """The log of a job's last submission; None if there is no log. LaunchError if the family has no such job."""
    job = find_job(jobs, name)
    found = [
        path
        for path in FamilyPaths(family).jobs.glob(f"{job.name}-*.log")
        if path.stem.removeprefix(f"{job.name}-").isdecimal()
    ]
    return max(found, key=lambda path: int(path.stem.rpartition("-")[2]), default=None)


def _status(family: Family, job: Job, jobs: Sequence[Job], rows: dict[str, Queued] | None) -> JobStatus:
    """The status of one job; `rows` is None if there is no queue."""
    row, history = (rows or {}).get(job.name), job_history(family, job)
    if _is_done(family, job):
        state, why = "finished", ""
    elif _is_training(family, job) and (row is None or row.state == "PENDING"):
        state, why = "running", ""
    elif row is not None:
        state = _STATE_NAMES.get(row.state, row.state.lower())
        why = _wait_reason(family, job, jobs, row) if state == "queued" else ""
    else:
        state, why = _out_of_queue(family, job, jobs, history, has_queue=rows is not None)
    iteration = iterations = None
    rate = ends = None
    if job.kind == "train" and job.stage is not None:
        iterations, paths = family_plan(family).stages[job.stage].iterations, FamilyPaths(family).stage(job.stage)
        steps = [record for record in records.read(paths.records) if isinstance(record, StepRecord)]
        steps = [] if has_only_discarded_steps(paths) else steps
        iteration = steps[-1].iteration if steps else reached_iteration(family, job)
        if state == "running":
            rate, ends = _pace(steps[-_RECENT:], iterations)
    return JobStatus(
        job=job.name,
        state=state,
        job_id=row.id if row else next((r.job_id for r in reversed(history) if r.job_id), None),
        iteration=iteration,
        iterations=iterations,
        tokens_per_second=rate,
        ends=ends,
        checkpoint=reached_iteration(family, job),
        why=why,
    )


def _pace(steps: Sequence[StepRecord], iterations: int) -> tuple[float | None, float | None]:
    """Tokens per second, and the time of the last step at the recent pace, validation and saves included."""
    if len(steps) < 2:
        return None, None
    rate = median(step.tokens_per_second for step in steps)
    pauses = [after.time - before.time for before, after in pairwise(steps)]
    # a restart between two steps must not count as pace, a save must: pauses are cut at 20 times the median
    median_pause = median(pauses)
    spent = sum(min(pause, 20 * median_pause) for pause in pauses) / len(pauses)
    return rate, steps[-1].time + (iterations - steps[-1].iteration) * spent


def _wait_reason(family: Family, job: Job, jobs: Sequence[Job], row: Queued) -> str:
    by_name = {other.name: other for other in jobs}
    needs = [name for name in job.needs if name in by_name and not _is_done(family, by_name[name])]
    if row.reason == "Dependency":
        return f"waits for {', '.join(needs)}" if needs else "about to start"
    if row.can_never_start:
        return "a job it needs has failed; `megagrow launch` submits it again"
    reason = next((text for prefix, text in _WAIT_REASONS.items() if row.reason.startswith(prefix)), f"({row.reason})")
    when = "" if row.start in ("", "N/A") else f", about {row.start.replace('T', ' ')}"
    return f"{reason if reason.startswith('held') else 'waits ' + reason}{when}"


def _is_done(family: Family, job: Job) -> bool:
    """Like `is_done`, but data that was prepared by hand is done, too: a run or launch would look at it again."""
    prepared_by_hand = job.kind == "data" and not job_history(family, job) and FamilyPaths(family).prepared.is_file()
    return prepared_by_hand or is_done(family, job)


def _is_training(family: Family, job: Job) -> bool:
    """Whether a process trains a job's stage, whoever started it."""
    return job.kind == "train" and job.stage is not None and is_held(FamilyPaths(family).stage(job.stage).lock) is True


def _out_of_queue(
    family: Family, job: Job, jobs: Sequence[Job], history: Sequence[JobRecord], *, has_queue: bool
) -> tuple[str, str]:
    """State and reason of a job that is neither finished nor in the queue; with a queue, Slurm may know its end."""
    if (reached := reached_iteration(family, job)) and (not history or history[-1].event == "finished"):
        return "stopped", f"at iteration {reached}: `megagrow train`, `run` or `launch` resumes it"  # trained by hand
    if not history:
        unfinished = [name for name in job.needs if not _is_done(family, find_job(tuple(jobs), name))]
        return "waiting", f"for {', '.join(unfinished)}" if unfinished else "not submitted yet"
    last = history[-1]
    if last.event == "failed":
        return "failed", last.detail or f"exit code {last.exit_code}"
    if last.job_id is None:  # a job of `megagrow run`
        # the job lives as long as the run that started it; a record of the start may outlive both
        alive = last.event == "started" and is_held(FamilyPaths(family).lock) is not False
        return ("running", "") if alive else ("stopped", "`megagrow run` resumes it")
    if not has_queue:
        return "unknown", f"was {last.event} as job {last.job_id}"
    return "stopped", f"{slurm.outcome(last.job_id) or 'left the queue'}; `megagrow launch` resumes it"
