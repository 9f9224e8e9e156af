"""From the records of a family to the numbers that a report shows.

A stage writes `<save>/<stage>/records.jsonl`, the family `<save>/records.jsonl`. A family in any state is a list
of stages of which some have no records yet, so everything that may not have happened is None or empty, and no
other case distinction is made. Costs go through `megagrow.plan.price` with the tokens really taken: plan and
outcome cannot disagree on what a FLOP is.
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
    """A loss in nats per token, where the family stood: tokens and training FLOPs since its first step."""

    tokens: int
    flops: float
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage so far. Losses are validation losses in nats per token, None where not measured yet."""

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
    """A family so far: `plan` is what was wanted, `spent` the finished stages, priced by the tokens they took.

    A stage in training is not in `spent`: what it saves is not earned before there is a model.
    """

    name: str
    plan: FamilyPlan
    spent: FamilyPlan
    stages: tuple[StageResult, ...]
    conversions: tuple[ConversionRecord, ...]
    jobs: tuple[JobRecord, ...]
    last_time: float | None

    @property
    def finished(self) -> bool:
        """Whether every stage has run to its end."""
        return all(stage.state == "finished" for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens trained on by all stages, finished or not."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Training FLOPs that the stages recorded, together."""
        return sum(stage.flops for stage in self.stages)

    @property
    def troubles(self) -> tuple[JobRecord, ...]:
        """Jobs whose last event is a failure or an interruption."""
        last = {job.job: job for job in self.jobs}
        return tuple(job for job in last.values() if job.event in ("failed", "interrupted"))


def collect(family: Family) -> FamilyResult:
    """Read the records of a family, whatever its state; ConfigError if it cannot be planned."""
    plan = family_plan(family)
    of_family = list(records.read(FamilyPaths(family).records))
    conversions = tuple(record for record in of_family if isinstance(record, ConversionRecord))
    times = [record.time for record in of_family]
    stages: list[StageResult] = []
    for index, (stage, planned) in enumerate(zip(family.stages, plan.stages, strict=True)):
        of_stage = list(records.read(FamilyPaths(family).stage(index).records))
        times += [record.time for record in of_stage]
        growth = _last(record for record in conversions if stages and _leads_to(record, stage))
        stages.append(_stage_result(stage, planned, of_stage, growth, stages))
    finished = [stage.tokens for stage in itertools.takewhile(lambda stage: stage.state == "finished", stages)]
    return FamilyResult(
        name=family.name,
        plan=plan,
        spent=price(family, finished),
        stages=tuple(stages),
        conversions=conversions,
        jobs=tuple(record for record in of_family if isinstance(record, JobRecord)),
        last_time=max(times, default=None),
    )


def _stage_result(
    stage: Stage,
    plan: StagePlan,
    of_stage: list[records.AnyRecord],
    growth: ConversionRecord | None,
    before: list[StageResult],
) -> StageResult:
    steps = {record.iteration: record for record in of_stage if isinstance(record, StepRecord)}
    evals = {record.iteration: record for record in of_stage if isinstance(record, EvalRecord)}
    measured: list[StepRecord | EvalRecord] = [*steps.values(), *evals.values()]
    done = _last(record for record in of_stage if isinstance(record, StageRecord))
    iterations = done.iterations if done else max([*steps, *evals], default=0)
    state: State = "waiting"
    if done:
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
        parameters=done.parameters if done else plan.parameters,
        iterations=iterations,
        tokens=done.stage_tokens if done else iterations * plan.tokens_per_step,
        flops=done.flops if done else max((record.flops for record in measured), default=0.0),
        seconds=done.seconds if done else None,
        loss_before_growth=before[-1].loss_at_end if before and before[-1].state == "finished" else None,
        loss_after_growth=evals[0].loss if before and 0 in evals else None,
        loss_at_end=evals[max(evals)].loss if evals else None,
        growth=growth,
        training=_points((record for record in steps.values() if not record.skipped), spent_before),
        validation=_points(evals.values(), spent_before),
    )


def _points(of_stage: Iterable[StepRecord | EvalRecord], spent_before: float) -> tuple[Point, ...]:
    """Points in order of the steps, on the family's axes; losses that are not finite cannot be drawn."""
    return tuple(
        Point(tokens=record.consumed_tokens, flops=spent_before + record.flops, loss=record.loss)
        for record in sorted(of_stage, key=lambda record: record.iteration)
        if math.isfinite(record.loss)
    )


def _leads_to(conversion: ConversionRecord, stage: Stage) -> bool:
    return stage.name in Path(conversion.target).parts


def _last(items: Iterable[_Item]) -> _Item | None:
    every = list(items)
    return every[-1] if every else None
