"""The jobs of a family and the order that they need.

A job is a verb of the command line with its arguments, so that anything an executor does can be done by hand. What
is finished is read from the disk (trackers, published checkpoints, records), never remembered: that is why the same
command goes on after any kill.
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
        name: unique in the family: `train-350m`.
        kind: what it does.
        stage: index of the stage that it serves; None for the whole family.
        arguments: of `megagrow`.
        processes: ranks that it runs on.
        needs: names of the jobs that come before.
        title: for people.
    """

    name: str
    kind: Kind
    stage: int | None
    arguments: tuple[str, ...]
    processes: int
    needs: tuple[str, ...]
    title: str


def family_jobs(family: Family, file: Path, overrides: tuple[str, ...] = ()) -> tuple[Job, ...]:
    """Return a family's jobs in an order that respects what they need."""
    tail = (str(file), *overrides)
    plan = family_plan(family)
    jobs = [Job("data", "data", None, ("data", *tail), 1, (), "tokenizer and tokens")]
    before = "data"
    for index, stage in enumerate(family.stages):
        if index > 0:
            parent = family.stages[index - 1].name
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
                    f"every tensor of {stage.name} accounted for",
                )
            )
            before = verify
        jobs.append(_train(family, plan, index, tail, before))
        before = jobs[-1].name
        if stage.export is not None:  # nothing waits for it
            jobs.append(_export(family, index, stage.export, tail, before))
    jobs.append(Job("report", "report", None, ("report", *tail), 1, (before,), str(FamilyPaths(family).report)))
    return tuple(jobs)


def is_finished(family: Family, job: Job) -> bool:
    """Whether the disk says that a job is done; data and report are quick to ask again and always run."""
    if job.stage is None:
        return False
    paths = FamilyPaths(family)
    stage = paths.stage(job.stage)
    last = stage.last_iteration()
    if job.kind == "train":
        wanted = family_plan(family).stages[job.stage].iterations
        closed = any(isinstance(record, StageRecord) for record in records.read(stage.records))
        return last is not None and last >= wanted and closed
    if job.kind == "export":
        ends = [record.time for record in records.read(stage.records) if isinstance(record, StageRecord)]
        written = _finished_times(paths, job)
        there = stage.exported(str(family.stages[job.stage].export)).is_dir()
        return bool(ends and written) and written[-1] >= ends[-1] and there
    if last is not None and last > 0:
        return True
    made = [
        record
        for record in records.read(paths.records)
        if isinstance(record, ConversionRecord) and Path(record.target).parent == stage.checkpoints
    ]
    if job.kind == "convert":
        # a damaged one may have been set aside since: then it is made again
        return last is not None and bool(made) and Path(made[-1].target).is_dir()
    proved = _finished_times(paths, job)
    return bool(made and proved) and proved[-1] >= made[-1].time and Path(made[-1].target).is_dir()


def _finished_times(paths: FamilyPaths, job: Job) -> list[float]:
    """When a job is on record as finished."""
    found = [record for record in records.read(paths.records) if isinstance(record, JobRecord)]
    return [record.time for record in found if record.job == job.name and record.event == "finished"]


def _export(family: Family, index: int, to: str, tail: tuple[str, ...], before: str) -> Job:
    name, place = family.stages[index].name, FamilyPaths(family).stage(index).exported(to)
    # whatever lies there is of an earlier end of the stage, or of a job that was killed before it said so
    arguments = ("convert", *tail, "--stage", name, "--to", to, "--overwrite")
    return Job(f"export-{name}", "export", index, arguments, 1, (before,), f"{name} -> {place}")


def _train(family: Family, plan: FamilyPlan, index: int, tail: tuple[str, ...], before: str) -> Job:
    stage, planned = family.stages[index], plan.stages[index]
    steps = f"{planned.iterations} steps of {planned.tokens_per_step} tokens"
    title = f"{steps}, {stage.parallel.describe()}, {stage.precision}"
    arguments = ("train", *tail, "--stage", stage.name)
    return Job(f"train-{stage.name}", "train", index, arguments, stage.parallel.world_size, (before,), title)
