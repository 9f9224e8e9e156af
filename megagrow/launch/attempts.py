"""One start of a job, seen from its script: is there work, and what follows when the work has ended?

The disk answers, not an exit code: a tracker that stands at the last iteration is a finished training, whatever the
processes said, and one that moved is worth another start, however they died. A start that moved nothing is counted;
after `cluster.retries` more of them the job has failed and waits for a person. So a family survives every night of
kills, and burns none on an error that comes back.
"""

import time
from enum import StrEnum

from megagrow import records, slurm_step
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError, UserError
from megagrow.launch.graph import Job, is_finished
from megagrow.launch.resources import cluster_of
from megagrow.records import JobRecord, StageRecord


class Answer(StrEnum):
    """What a script does next; its values are the words that it reads."""

    WORK = "work"
    FINISHED = "finished"
    AGAIN = "again"
    FAILED = "failed"


def find_job(jobs: tuple[Job, ...], name: str) -> Job:
    """Return the job of a name; LaunchError names what there is."""
    for job in jobs:
        if job.name == name:
            return job
    raise LaunchError(f"no job {name!r}: there are {', '.join(job.name for job in jobs)}")


def is_done(family: Family, job: Job) -> bool:
    """Whether the disk shows a job as done, also those that a run on one machine just asks again."""
    if job.stage is not None:
        return is_finished(family, job)
    mine = history(family, job)
    if not mine or mine[-1].event != "finished":
        return False
    if job.kind == "data":
        return FamilyPaths(family).prepared.is_file()
    return mine[-1].time >= max(_ends(family), default=0.0) and FamilyPaths(family).report.is_file()


def history(family: Family, job: Job) -> list[JobRecord]:
    """What is on record of a job, oldest first."""
    path = FamilyPaths(family).records
    return [record for record in records.read(path) if isinstance(record, JobRecord) and record.job == job.name]


def reached(family: Family, job: Job) -> int | None:
    """The iteration that a training has reached by its tracker; other jobs have none."""
    if job.kind != "train" or job.stage is None:
        return None
    return FamilyPaths(family).stage(job.stage).last_iteration()


def begin(family: Family, job: Job) -> tuple[Answer, str]:
    """Decide at the start of a script, and record it; with the answer comes its reason, for people."""
    if is_done(family, job):
        return Answer.FINISHED, f"{job.name}: done before"
    vain = _vain_starts(family, job)
    if vain > cluster_of(family).retries:
        return Answer.FAILED, _give_up(family, job, vain, None)
    _record(family, job, "started")
    return Answer.WORK, f"{job.name}: {job.title}{_place(family, job)}"


def ended(family: Family, job: Job, code: int) -> tuple[Answer, str]:
    """Decide after a job's processes have ended with an exit code, and record it.

    A job other than training that ended well is finished; one that ended with a user's error would do so again.
    """
    if (code == 0 and job.kind != "train") or is_done(family, job):
        _record(family, job, "finished", exit_code=code)
        return Answer.FINISHED, f"{job.name}: finished"
    if job.kind != "train" and code == UserError.exit_code:
        words = f"{job.name}: its log says what to mend; then give `megagrow launch` again"
        _record(family, job, "failed", words, exit_code=code)
        return Answer.FAILED, words
    vain = _vain_starts(family, job)
    if vain > cluster_of(family).retries:
        return Answer.FAILED, _give_up(family, job, vain, code)
    words = f"{job.name}: not finished (exit code {code}){_place(family, job)}"
    _record(family, job, "interrupted", words, exit_code=code)
    return Answer.AGAIN, words


def _vain_starts(family: Family, job: Job) -> int:
    """Starts in a row, up to now, that began where the job still stands; a new submission counts afresh."""
    here, count = reached(family, job), 0
    for record in reversed(history(family, job)):
        if record.event == "submitted":
            break
        if record.event == "started":
            if record.iteration != here:
                break
            count += 1
    return count


def _give_up(family: Family, job: Job, starts: int, code: int | None) -> str:
    words = (
        f"{job.name}: {starts} start(s) brought nothing{_place(family, job)}: `megagrow logs FAMILY {job.name}` says "
        "why; mend it, and give `megagrow launch` again"
    )
    _record(family, job, "failed", words, exit_code=code)
    return words


def _place(family: Family, job: Job) -> str:
    iteration = reached(family, job)
    return "" if iteration is None else f", at iteration {iteration}"


def _record(family: Family, job: Job, event: str, detail: str = "", *, exit_code: int | None = None) -> None:
    now, path = time.time(), FamilyPaths(family).records
    begun = [record.time for record in history(family, job) if record.event == "started"]
    record = JobRecord.model_validate(
        {
            "time": now,
            "job": job.name,
            "event": event,
            "detail": detail,
            "job_id": slurm_step.job_id(),
            "iteration": reached(family, job),
            "exit_code": exit_code,
            "seconds": now - begun[-1] if begun and event != "started" else None,
        }
    )
    records.append(path, record)


def _ends(family: Family) -> list[float]:
    """When the stages were finished."""
    paths = FamilyPaths(family)
    found = [records.read(paths.stage(index).records) for index in range(len(family.stages))]
    return [record.time for stage in found for record in stage if isinstance(record, StageRecord)]
