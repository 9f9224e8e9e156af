"""The jobs of a family, their order, and which of them are finished.

A job is a verb of the command line with its arguments, so everything an executor does can also be done by hand. Which
jobs are finished is read from disk (trackers, published checkpoints, records) and never kept in memory, so the same
command resumes after any kill.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagrow import records
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.plan import FamilyPlan, family_plan
from megagrow.records import ConversionRecord, JobRecord, StageRecord

Kind = Literal["data", "train", "convert", "verify", "export", "report"]


@dataclass(frozen=True)
class Job:
    """One job of a family.

    Attributes:
        name: unique in the family, e.g. `train-350m`.
        kind: the verb of its command line, or `export`.
        stage: index of the stage that it works on; None for a job of the whole family.
        arguments: arguments of `megagrow`.
        processes: number of ranks that it runs on.
        needs: names of the jobs that must be finished first.
        title: one line for people.
    """

    name: str
    kind: Kind
    stage: int | None
    arguments: tuple[str, ...]
    processes: int
    needs: tuple[str, ...]
    title: str


def family_jobs(family: Family, file: Path, overrides: tuple[str, ...] = ()) -> tuple[Job, ...]:
    """Return a family's jobs in an order in which each job follows the jobs that it needs."""
    tail = (str(file), *overrides)
    plan = family_plan(family)
    jobs = [Job("data", "data", None, ("data", *tail), 1, (), "tokenizer and tokens")]
    before = "data"
    for index, stage in enumerate(family.stages):
        if index > 0 or stage.load is not None:
            parent = str(stage.load) if index == 0 else family.stages[index - 1].name
            convert, verify = f"convert-{stage.name}", f"verify-{stage.name}"
            jobs.append(
                Job(
                    convert,
                    "convert",
                    index,
                    ("convert", *tail, "--stage", stage.name),
                    1,
                    (before,),
                    f"{parent} -> {stage.name} ({stage.parallel.describe()})",
                )
            )
            jobs.append(
                Job(
                    verify,
                    "verify",
                    index,
                    ("verify", *tail, "--stage", stage.name),
                    1,
                    (convert,),
                    f"check every tensor of {stage.name}",
                )
            )
            before = verify
        if not stage.finished:
            jobs.append(_train(family, plan, index, tail, before))
            before = jobs[-1].name
        if stage.export is not None:  # no job waits for an export
            jobs.append(_export(family, index, stage.export, tail, before))
    jobs.append(Job("report", "report", None, ("report", *tail), 1, (before,), str(FamilyPaths(family).report)))
    return tuple(jobs)


def is_finished(family: Family, job: Job) -> bool:
    """Whether a job is finished according to the disk; False for data and report, which are fast and always run."""
    if job.stage is None:
        return False
    paths = FamilyPaths(family)
    stage = paths.stage(job.stage)
    last = stage.last_iteration()
    if job.kind == "train":
        wanted = family_plan(family).stages[job.stage].iterations
        lengths = [record.iterations for record in records.read(stage.records) if isinstance(record, StageRecord)]
        # a stage that got more tokens has the record of its earlier end, too
        return last is not None and last >= wanted and max(lengths, default=0) >= wanted
    if job.kind == "export":
        ends, exports = stage_end_times(family, job.stage), _finished_times(family, job)
        if family.stages[job.stage].finished:
            ends = [record.time for record in _conversions(family, job.stage)]
        exists = stage.exported(str(family.stages[job.stage].export)).is_dir()
        return bool(ends and exports) and exports[-1] >= ends[-1] and exists
    if last is not None and last > 0:
        return True
    conversions = _conversions(family, job.stage)
    exists = bool(conversions) and (stage.checkpoints / Path(conversions[-1].target).name).is_dir()
    if job.kind == "convert":
        # a damaged target may have been set aside since its conversion: then the stage is converted again
        return last is not None and exists
    checks = _finished_times(family, job)
    return bool(exists and checks) and checks[-1] >= conversions[-1].time


def job_history(family: Family, job: Job) -> list[JobRecord]:
    """All records of a job, oldest first."""
    path = FamilyPaths(family).records
    return [record for record in records.read(path) if isinstance(record, JobRecord) and record.job == job.name]


def stage_end_times(family: Family, index: int) -> list[float]:
    """The times at which the training of a stage finished, oldest first; more than one if it was trained again."""
    path = FamilyPaths(family).stage(index).records
    return [record.time for record in records.read(path) if isinstance(record, StageRecord)]


def _conversions(family: Family, index: int) -> list[ConversionRecord]:
    """The conversions into a stage, oldest first."""
    paths = FamilyPaths(family)
    return [
        record
        for record in records.read(paths.records)
        if isinstance(record, ConversionRecord) and paths.stage(index).contains_checkpoint(record.target)
    ]


def _finished_times(family: Family, job: Job) -> list[float]:
    return [record.time for record in job_history(family, job) if record.event == "finished"]


def _export(family: Family, index: int, to: str, tail: tuple[str, ...], before: str) -> Job:
    name, target = family.stages[index].name, FamilyPaths(family).stage(index).exported(to)
    # an existing target is from an earlier end of the stage, or from a job killed before it could record its end
    arguments = ("convert", *tail, "--stage", name, "--to", to, "--overwrite")
    return Job(f"export-{name}", "export", index, arguments, 1, (before,), f"{name} -> {target}")


def _train(family: Family, plan: FamilyPlan, index: int, tail: tuple[str, ...], before: str) -> Job:
    stage, planned = family.stages[index], plan.stages[index]
    steps = f"{planned.iterations} steps of {planned.tokens_per_step} tokens"
    title = f"{steps}, {stage.parallel.describe()}, {stage.precision}"
    arguments = ("train", *tail, "--stage", stage.name)
    return Job(f"train-{stage.name}", "train", index, arguments, stage.parallel.world_size, (before,), title)
