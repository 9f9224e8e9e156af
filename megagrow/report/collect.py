"""Computes the numbers of a report from a family's records.

A stage writes `<save>/<stage>/records.jsonl`, the family `<save>/records.jsonl`. A family may be in any state: what has
not happened yet is None or empty, and there are no other special cases. Costs are computed by `megagrow.plan.price`
from the tokens actually used, so that the plan and the result count FLOPs in the same way.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

from megagrow import records
from megagrow.config import Family, Stage
from megagrow.config.paths import FamilyPaths
from megagrow.plan import FamilyPlan, StagePlan, family_plan, price
from megagrow.records import ConversionRecord, EvalRecord, JobRecord, StageRecord, StepRecord

State = Literal["waiting", "grown", "training", "finished"]
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A loss in nats per token, with the family's tokens and training FLOPs since its first step."""

    tokens: int
    flops: float
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """The results of a stage so far. Losses are validation losses in nats per token; None if not measured yet."""

    plan: StagePlan
    precision: str
    state: State
    parameters: int
    iterations: int
    tokens: int
    flops: float
    seconds: float | None
    loss_before_growth: float | None
    loss_after_growth: float | None
    loss_at_end: float | None
    growth: ConversionRecord | None
    training: tuple[Point, ...]
    validation: tuple[Point, ...]

    @property
    def change_by_growth(self) -> float | None:
        """Loss right after growth minus the parent's last loss: 0 for a function-preserving growth."""
        if self.loss_before_growth is None or self.loss_after_growth is None:
            return None
        return self.loss_after_growth - self.loss_before_growth


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyResult:
    """The results of a family so far: `plan` is the whole plan, `spent` the cost of the finished stages.

    `spent` is priced by the tokens that the stages used. It leaves out a stage in training, because an unfinished model
    has not saved anything yet.
    """

    name: str
    plan: FamilyPlan
    spent: FamilyPlan
    stages: tuple[StageResult, ...]
    conversions: tuple[ConversionRecord, ...]
    jobs: tuple[JobRecord, ...]
    last_time: float | None

    @property
    def is_finished(self) -> bool:
        """Whether every stage is finished."""
        return all(stage.state == "finished" for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Training tokens of all stages, finished or not."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Training FLOPs recorded by all stages together."""
        return sum(stage.flops for stage in self.stages)

    @property
    def failed_jobs(self) -> tuple[JobRecord, ...]:
        """The last records of jobs that failed or were interrupted."""
        last = {job.job: job for job in self.jobs}
        return tuple(job for job in last.values() if job.event in ("failed", "interrupted"))


def collect(family: Family) -> FamilyResult:
    """Compute the results of a family in any state; ConfigError if it cannot be planned."""
    plan = family_plan(family)
    family_records = list(records.read(FamilyPaths(family).records))
    conversions = tuple(record for record in family_records if isinstance(record, ConversionRecord))
    times = [record.time for record in family_records]
    stages: list[StageResult] = []
    for index, (stage, planned) in enumerate(zip(family.stages, plan.stages, strict=True)):
        stage_records = list(records.read(FamilyPaths(family).stage(index).records))
        times += [record.time for record in stage_records]
        growth = _last(record for record in conversions if stages and _is_conversion_into(record, stage))
        stages.append(_stage_result(stage, planned, stage_records, growth, stages))
    finished = [stage.tokens for stage in itertools.takewhile(lambda stage: stage.state == "finished", stages)]
    return FamilyResult(
        name=family.name,
        plan=plan,
        spent=price(family, finished),
        stages=tuple(stages),
        conversions=conversions,
        jobs=tuple(record for record in family_records if isinstance(record, JobRecord)),
        last_time=max(times, default=None),
    )


def _stage_result(
    stage: Stage,
    plan: StagePlan,
    stage_records: list[records.AnyRecord],
    growth: ConversionRecord | None,
    before: list[StageResult],
) -> StageResult:
    steps = {record.iteration: record for record in stage_records if isinstance(record, StepRecord)}
    evals = {record.iteration: record for record in stage_records if isinstance(record, EvalRecord)}
    measured: list[StepRecord | EvalRecord] = [*steps.values(), *evals.values()]
    end = _last(record for record in stage_records if isinstance(record, StageRecord))
    iterations = end.iterations if end else max([*steps, *evals], default=0)
    state: State = "waiting"
    if end:
        state = "finished"
    elif measured:
        state = "training"
    elif growth:
        state = "grown"
    spent_before = sum(result.flops for result in before)
    return StageResult(
        plan=plan,
        precision=stage.precision,
        state=state,
        parameters=end.parameters if end else plan.parameters,
        iterations=iterations,
        tokens=end.stage_tokens if end else iterations * plan.tokens_per_step,
        flops=end.flops if end else max((record.flops for record in measured), default=0.0),
        seconds=end.seconds if end else None,
        loss_before_growth=before[-1].loss_at_end if before and before[-1].state == "finished" else None,
        loss_after_growth=evals[0].loss if before and 0 in evals else None,
        loss_at_end=evals[max(evals)].loss if evals else None,
        growth=growth,
        training=_points((record for record in steps.values() if not record.skipped), spent_before),
        validation=_points(evals.values(), spent_before),
    )


def _points(stage_records: Iterable[StepRecord | EvalRecord], spent_before: float) -> tuple[Point, ...]:
    """Points in the order of steps, on the family's axes, without losses that are not finite."""
    return tuple(
        Point(tokens=record.consumed_tokens, flops=spent_before + record.flops, loss=record.loss)
        for record in sorted(stage_records, key=lambda record: record.iteration)
        if math.isfinite(record.loss)
    )


def _is_conversion_into(conversion: ConversionRecord, stage: Stage) -> bool:
    return stage.name in Path(conversion.target).parts


def _last(items: Iterable[_Item]) -> _Item | None:
    found = list(items)
    return found[-1] if found else None
