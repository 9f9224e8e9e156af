"""Submits a family: queues every unfinished job, each dependent on the jobs that it needs.

A launch keeps no state of its own; it reads the disk and the queue. It can therefore be repeated at any time: finished
jobs are skipped, waiting and running jobs stay as they are, and the rest is submitted. Every job is checked before any
is queued, by megagrow and by Slurm (`sbatch --test-only`).
"""

import time
from collections.abc import Sequence
from pathlib import Path

from megagrow import records
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError
from megagrow.files.atomic import write_atomically
from megagrow.history import refuse_edits
from megagrow.launch import slurm
from megagrow.launch.attempts import find_job, is_done
from megagrow.launch.frozen import freeze, frozen_yaml
from megagrow.launch.graph import Job, family_jobs
from megagrow.launch.local import Announce, family_lock
from megagrow.launch.preflight import check_cluster, check_family
from megagrow.launch.render import render, script_name
from megagrow.launch.slurm import Queued
from megagrow.records import JobRecord


def render_scripts(family: Family, file: Path, overrides: tuple[str, ...], directory: Path) -> dict[Path, str]:
    """Return the text of every job's script, by the path it would have in `directory`; nothing is written.

    Raises LaunchError if a job could never run, or if a stage was made with other settings than the family has now.
    This works anywhere, because it does not query the cluster.
    """
    jobs = family_jobs(family, file, overrides)
    check_family(family, jobs)
    refuse_edits(family)
    return {directory / script_name(job): render(family, job, directory / script_name(job)) for job in jobs}


def launch(family: Family, announce: Announce) -> dict[str, str]:
    """Submit the jobs that are neither finished nor queued; return the numbers of the submitted jobs by name.

    Raises:
        LaunchError: a job could never run, a stage was made with other settings, or Slurm rejects a script.
    """
    file = frozen_yaml(family)
    jobs = family_jobs(family, file)
    check_family(family, jobs)
    check_cluster(family, jobs)
    family.save.mkdir(parents=True, exist_ok=True)
    with family_lock(FamilyPaths(family).lock):
        refuse_edits(family)
        unfinished = [job for job in jobs if not is_done(family, job)]
        rows = in_queue(family, unfinished)
        kept = _kept(family, unfinished, rows)
        fresh = [job for job in unfinished if job.name not in kept]
        freeze(family)
        for job in fresh:
            path = _script(family, job)
            write_atomically(path, render(family, job, path))
            slurm.test_script(path)
        slurm.cancel([rows[job.name].id for job in fresh if job.name in rows])
        return _submit(family, jobs, fresh, kept, announce)


def in_queue(family: Family, jobs: Sequence[Job]) -> dict[str, Queued]:
    """The queue entry of each queued job; the newest, if a job has several."""
    names, found = {job.name for job in jobs}, {}
    for row in sorted(slurm.queue(), key=lambda row: int(row.id.partition("_")[0])):
        name = slurm.job_of(family, row)
        if name in names and name is not None:
            found[name] = row
    return found


def cancel(family: Family, file: Path, names: Sequence[str]) -> dict[str, str]:
    """Cancel the named jobs of a family, by default all; return their numbers by name.

    Training ranks get SIGTERM from Slurm and save. Slurm itself cancels the jobs that depend on a canceled job.
    """
    jobs = family_jobs(family, file)
    wanted = [find_job(jobs, name) for name in names] or list(jobs)
    found = {name: row.id for name, row in in_queue(family, wanted).items()}
    slurm.cancel(list(reversed(found.values())))  # last first, so that no job starts because one before it ended
    return found


def _kept(family: Family, unfinished: Sequence[Job], rows: dict[str, Queued]) -> dict[str, str]:
    """Numbers of the queued jobs that stay as they are.

    A waiting job is not kept, but submitted again, if its script has changed or if it does not depend on the jobs that
    it needs now. LaunchError if a running job has other settings than the family, or if a job is just ending.
    """
    kept: dict[str, str] = {}
    names = {job.name for job in unfinished}
    for job in unfinished:
        row = rows.get(job.name)
        if row is None:
            continue
        if row.state == "COMPLETING":
            raise LaunchError(f"{job.name} (job {row.id}) is just ending: run the same command again in a minute")
        path = _script(family, job)
        unchanged = path.is_file() and path.read_text(encoding="utf-8") == render(family, job, path)
        if row.state != "PENDING":
            if not unchanged:
                raise LaunchError(
                    f"{job.name} is running as job {row.id} with other settings: "
                    f"`megagrow cancel FAMILY --job {job.name}` lets it save; then launch again"
                )
            kept[job.name] = row.id
            continue
        needed = [kept.get(name, "not in the queue") for name in job.needs if name in names]
        if unchanged and not row.can_never_start and all(f":{number}(" in f"{row.dependency}(" for number in needed):
            kept[job.name] = row.id
    return kept


def _submit(
    family: Family, jobs: Sequence[Job], fresh: Sequence[Job], kept: dict[str, str], announce: Announce
) -> dict[str, str]:
    """Queue the fresh jobs in order, each dependent on the queued jobs that it needs."""
    numbers, submitted = dict(kept), {}
    for job in jobs:
        if job in fresh:
            needed = [name for name in job.needs if name in numbers]
            numbers[job.name] = slurm.submit(_script(family, job), [numbers[name] for name in needed])
            submitted[job.name] = numbers[job.name]
            path = FamilyPaths(family).records
            record = JobRecord(time=time.time(), job=job.name, event="submitted", job_id=numbers[job.name])
            records.append(path, record)
            dependency = f", after {' '.join(needed)}" if needed else ""
            announce(f"{job.name}: submitted as job {numbers[job.name]}{dependency}")
        else:
            announce(
                f"{job.name}: {f'in the queue as job {kept[job.name]}' if job.name in kept else 'already finished'}"
            )
    return submitted


def _script(family: Family, job: Job) -> Path:
    return FamilyPaths(family).jobs / script_name(job)
