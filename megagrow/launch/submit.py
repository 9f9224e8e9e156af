"""A family into the queue: every job that is not done, each behind the one that it needs.

Nothing is remembered between launches but what disk and queue show, so a launch may be given again at any time: what
is finished is passed over, what waits or runs stays as it is, and the rest is submitted. All is judged before
anything is queued, by us and by Slurm (`sbatch --test-only`).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megagrow import records
from megagrow.atomic import write_whole
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.launch import edits, slurm
from megagrow.launch.attempts import find_job, is_done
from megagrow.launch.graph import Job, family_jobs
from megagrow.launch.local import alone
from megagrow.launch.preflight import check_cluster, check_family
from megagrow.launch.render import render, script_name
from megagrow.launch.slurm import Queued
from megagrow.records import JobRecord

Tell = Callable[[str], None]


def scripts(family: Family, file: Path, overrides: tuple[str, ...], directory: Path) -> dict[Path, str]:
    """Return the text of every job's script, by the path that it will have in `directory`; nothing is written.

    LaunchError where a job could never run; the cluster itself is not asked, so this works anywhere.
    """
    jobs = family_jobs(family, file, overrides)
    check_family(family, jobs)
    edits.refuse_edits(family)
    return {directory / script_name(job): render(family, job, directory / script_name(job)) for job in jobs}


def launch(family: Family, tell: Tell) -> dict[str, str]:
    """Submit what is neither finished nor in the queue; return the numbers of the submitted jobs by name.

    Raises:
        LaunchError: something could never run, a stage that has begun was edited, or Slurm refuses a script.
    """
    file = edits.frozen(family)
    jobs = family_jobs(family, file)
    check_family(family, jobs)
    check_cluster(family, jobs)
    family.save.mkdir(parents=True, exist_ok=True)
    with alone(FamilyPaths(family).lock):
        edits.refuse_edits(family)
        todo = [job for job in jobs if not is_done(family, job)]
        rows = in_queue(family, todo)
        kept = _kept(family, todo, rows)
        fresh = [job for job in todo if job.name not in kept]
        edits.freeze(family)
        for job in fresh:
            path = _script(family, job)
            write_whole(path, render(family, job, path))
            slurm.test(path)
        slurm.cancel([rows[job.name].id for job in fresh if job.name in rows])
        return _submit(family, jobs, fresh, kept, tell)


def in_queue(family: Family, jobs: Sequence[Job]) -> dict[str, Queued]:
    """Each job's entry in the queue, where it has one; of several the newest."""
    names, found = {job.name for job in jobs}, {}
    for row in sorted(slurm.queue(), key=lambda row: int(row.id.partition("_")[0])):
        name = slurm.job_of(family, row)
        if name in names and name is not None:
            found[name] = row
    return found


def cancel(family: Family, file: Path, names: Sequence[str]) -> dict[str, str]:
    """Take jobs of a family, by default all, from the queue; return their numbers by name.

    Ranks that train are told to save by Slurm's SIGTERM. What waits for a canceled job is canceled by Slurm itself.
    """
    jobs = family_jobs(family, file)
    wanted = [find_job(jobs, name) for name in names] or list(jobs)
    found = {name: row.id for name, row in in_queue(family, wanted).items()}
    slurm.cancel(list(reversed(found.values())))  # the last first: none may start because one before it went
    return found


def _kept(family: Family, todo: Sequence[Job], rows: dict[str, Queued]) -> dict[str, str]:
    """Numbers of the jobs in the queue that stay as they are.

    One that only waits is given up, to be submitted anew, when its script has changed since or when it does not wait
    for the jobs that it needs now. LaunchError for one that runs and should be another, or is on its way out.
    """
    kept: dict[str, str] = {}
    names = {job.name for job in todo}
    for job in todo:
        row = rows.get(job.name)
        if row is None:
            continue
        if row.state == "COMPLETING":
            raise LaunchError(f"{job.name} (job {row.id}) is just ending: give the same command again in a minute")
        path = _script(family, job)
        same = path.is_file() and path.read_text(encoding="utf-8") == render(family, job, path)
        if row.state != "PENDING":
            if not same:
                raise LaunchError(
                    f"{job.name} runs as job {row.id} with other settings: `megagrow cancel FAMILY {job.name}` lets "
                    "it save; then launch again"
                )
            kept[job.name] = row.id
            continue
        behind = [kept.get(name, "not in the queue") for name in job.needs if name in names]
        if same and not row.is_lost and all(f":{number}(" in f"{row.dependency}(" for number in behind):
            kept[job.name] = row.id
    return kept


def _submit(
    family: Family, jobs: Sequence[Job], fresh: Sequence[Job], kept: dict[str, str], tell: Tell
) -> dict[str, str]:
    """Queue the fresh jobs in their order, each behind what it needs of the open ones."""
    numbers, submitted = dict(kept), {}
    for job in jobs:
        if job in fresh:
            behind = [name for name in job.needs if name in numbers]
            numbers[job.name] = slurm.submit(_script(family, job), [numbers[name] for name in behind])
            submitted[job.name] = numbers[job.name]
            path = FamilyPaths(family).records
            record = JobRecord(time=time.time(), job=job.name, event="submitted", job_id=numbers[job.name])
            records.append(path, record)
            words = f"submitted as job {numbers[job.name]}"
            tell(f"{job.name}: {words}{', behind ' + ' '.join(behind) if behind else ''}")
        else:
            tell(f"{job.name}: {f'in the queue as job {kept[job.name]}' if job.name in kept else 'done before'}")
    return submitted


def _script(family: Family, job: Job) -> Path:
    return FamilyPaths(family).jobs / script_name(job)
