"""Decides at the start and at the end of each attempt at a job what its sbatch script does next.

The disk decides, not an exit code. A training whose tracker is at the last iteration is finished, whatever its
processes reported; a training whose tracker has advanced gets another attempt, however its processes died. Attempts
without progress are counted: after `cluster.retries` more of them the job has failed and waits for the user. A family
therefore survives any number of kills but wastes no attempts on an error that recurs.
"""

import time
from enum import StrEnum

from megagrow import records, slurm_step
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError, UserError
from megagrow.launch.environment import environment
from megagrow.launch.graph import Job, is_finished, job_history, stage_end_times
from megagrow.launch.render import script_name
from megagrow.launch.resources import cluster_of
from megagrow.records import JobRecord


class Decision(StrEnum):
    """What a job's script does next; the values are the words that the script reads."""

    WORK = "work"
    FINISHED = "finished"
    AGAIN = "again"
    FAILED = "failed"


def find_job(jobs: tuple[Job, ...], name: str) -> Job:
    """Return the job with a name; LaunchError, with the names of all jobs, if there is none."""
    for job in jobs:
        if job.name == name:
            return job
    raise LaunchError(f"no job {name!r}: choose from {', '.join(job.name for job in jobs)}")


def is_done(family: Family, job: Job) -> bool:
    """Like `is_finished`, but also decides for data and report, which a run on one machine always repeats."""
    if job.stage is not None:
        return is_finished(family, job)
    history = job_history(family, job)
    if not history or history[-1].event != "finished":
        return False
    if job.kind == "data":
        return FamilyPaths(family).prepared.is_file()
    stage_ends = [end for index in range(len(family.stages)) for end in stage_end_times(family, index)]
    return history[-1].time >= max(stage_ends, default=0.0) and FamilyPaths(family).report.is_file()


def reached_iteration(family: Family, job: Job) -> int | None:
    """The iteration in the tracker of a training's stage; None for jobs of other kinds."""
    if job.kind != "train" or job.stage is None:
        return None
    return FamilyPaths(family).stage(job.stage).last_iteration()


def decide_at_start(family: Family, job: Job) -> tuple[Decision, str]:
    """Decide before a script starts its work, and record the decision; return it with its reason, for people."""
    if is_done(family, job):
        return Decision.FINISHED, f"{job.name}: already finished"
    attempts = _attempts_without_progress(family, job)
    if attempts > cluster_of(family).retries:
        return Decision.FAILED, _give_up(family, job, attempts, None)
    _record(family, job, "started")
    return Decision.WORK, f"{job.name}: {job.title}{_position(family, job)}"


def decide_at_end(family: Family, job: Job, code: int) -> tuple[Decision, str]:
    """Decide after a job's processes have ended with an exit code, and record the decision.

    A job other than training is finished if its exit code is 0. A job that ended with a user's error and made no
    progress has failed, because another attempt would end the same way.
    """
    if (code == 0 and job.kind != "train") or is_done(family, job):
        _record(family, job, "finished", exit_code=code)
        return Decision.FINISHED, f"{job.name}: finished"
    attempts = _attempts_without_progress(family, job)
    if code == UserError.exit_code and (job.kind != "train" or attempts):
        reason = f"{job.name}: fix the error in its log, then run `megagrow launch` again"
        _record(family, job, "failed", reason, exit_code=code)
        return Decision.FAILED, reason
    if attempts > cluster_of(family).retries:
        return Decision.FAILED, _give_up(family, job, attempts, code)
    reason = f"{job.name}: not finished (exit code {code}){_position(family, job)}"
    _record(family, job, "interrupted", reason, exit_code=code)
    return Decision.AGAIN, reason


def _attempts_without_progress(family: Family, job: Job) -> int:
    """The number of latest attempts in a row that started at the job's present iteration, since its submission."""
    here, count = reached_iteration(family, job), 0
    for record in reversed(job_history(family, job)):
        if record.event == "submitted":
            break
        if record.event == "started":
            if record.iteration != here:
                break
            count += 1
    return count


def _give_up(family: Family, job: Job, attempts: int, code: int | None) -> str:
    reason = (
        f"{job.name}: {attempts} attempt(s) made no progress{_position(family, job)}: find the cause with "
        f"`megagrow logs FAMILY {job.name}`, fix it, and run `megagrow launch` again"
    )
    _record(family, job, "failed", reason, exit_code=code)
    return reason


def _position(family: Family, job: Job) -> str:
    iteration = reached_iteration(family, job)
    return "" if iteration is None else f", at iteration {iteration}"


def _record(family: Family, job: Job, event: str, detail: str = "", *, exit_code: int | None = None) -> None:
    now, path = time.time(), FamilyPaths(family).records
    starts = [record.time for record in job_history(family, job) if record.event == "started"]
    record = JobRecord.model_validate(
        {
            "time": now,
            "job": job.name,
            "event": event,
            "detail": detail,
            "job_id": slurm_step.job_id(),
            "iteration": reached_iteration(family, job),
            "exit_code": exit_code,
            "environment": environment(FamilyPaths(family).jobs / script_name(job)) if event == "started" else None,
            "seconds": now - starts[-1] if starts and event != "started" else None,
        }
    )
    records.append(path, record)
