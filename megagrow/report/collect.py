"""Computes the numbers of a report from a family's records.

A stage writes `<save>/<stage>/records.jsonl`, the family `<save>/records.jsonl`. A family may be in any state: what has
not happened yet is None or empty, and there are no other special cases. Costs are computed by `megagrow.plan.price`
from the tokens actually used, so that the plan and the result count FLOPs in the same way. A family.yaml that differs
from what its stages were made with is refused, so that no result stands beside settings that it does not have.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

from megagrow import records
from megagrow.config import Family, Stage
from megagrow.config.paths import FamilyPaths
from megagrow.history import Origin, has_only_discarded_steps, read_history, refuse_edits
from megagrow.plan import FamilyPlan, StagePlan, family_plan, price
from megagrow.records import ConversionRecord, EvalRecord, JobRecord, StageRecord, StepRecord

State = Literal["waiting", "loaded", "grown", "training", "finished"]
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
    losses: Mapping[int, float]
    """Validation loss by iteration."""

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
    """Compute the results of a family in any state.

    Raises:
        ConfigError: it cannot be planned.
        LaunchError: a stage was made with other settings than the family has now.
    """
    refuse_edits(family)
    plan = family_plan(family)
    family_records = list(records.read(FamilyPaths(family).records))
    conversions = tuple(record for record in family_records if isinstance(record, ConversionRecord))
    times = [record.time for record in family_records]
    stages: list[StageResult] = []
    for index, (stage, planned) in enumerate(zip(family.stages, plan.stages, strict=True)):
        paths = FamilyPaths(family).stage(index)
        stage_records = [] if has_only_discarded_steps(paths) else list(records.read(paths.records))
        times += [record.time for record in stage_records]
        growth = _last(record for record in conversions if paths.contains_checkpoint(record.target))
        history = read_history(paths)
        origin = history.origin if history else None
        stages.append(_stage_result(stage, planned, stage_records, growth, stages, origin))
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
    origin: Origin | None,
) -> StageResult:
    steps = {record.iteration: record for record in stage_records if isinstance(record, StepRecord)}
    evals = {record.iteration: record for record in stage_records if isinstance(record, EvalRecord)}
    measured: list[StepRecord | EvalRecord] = [*steps.values(), *evals.values()]
    # a stage that got more tokens after its end is in training again
    ends = (record for record in stage_records if isinstance(record, StageRecord))
    end = _last(record for record in ends if record.iterations >= plan.iterations)
    iterations = end.iterations if end else max([*steps, *evals], default=0)
    state: State = "waiting"
    if end or (growth and stage.finished):
        state = "finished"
    elif measured:
        state = "training"
    elif growth:
        state = "loaded" if stage.load is not None else "grown"
    spent_before = sum(result.flops for result in before)
    tokens = max((step.stage_tokens or 0 for step in steps.values()), default=0)
    return StageResult(
        plan=plan,
        precision=stage.precision,
        state=state,
        parameters=end.parameters if end else plan.parameters,
        iterations=iterations,
        tokens=end.stage_tokens if end else tokens or iterations * plan.tokens_per_step,
        flops=end.flops if end else max((record.flops for record in measured), default=0.0),
        seconds=end.seconds if end else None,
        loss_before_growth=_loss_of_parent(before, origin),
        loss_after_growth=evals[0].loss if before and 0 in evals else None,
        loss_at_end=evals[max(evals)].loss if evals else None,
        growth=growth if before else None,
        training=_points((record for record in steps.values() if not record.skipped), spent_before),
        validation=_points(evals.values(), spent_before),
        losses={iteration: record.loss for iteration, record in evals.items()},
    )


def _loss_of_parent(before: list[StageResult], origin: Origin | None) -> float | None:
    """The validation loss of the checkpoint that a stage grew from; None if it is not known, or not of this family."""
    if not before:
        return None
    parent = before[-1]
    if origin is None:  # not grown yet, or its checkpoint cannot be read
        return parent.loss_at_end if parent.state == "finished" else None
    return parent.losses.get(origin.iteration) if origin.stage == parent.plan.name else None


def _points(stage_records: Iterable[StepRecord | EvalRecord], spent_before: float) -> tuple[Point, ...]:
    """Points in the order of steps, on the family's axes, without losses that are not finite."""
    return tuple(
        Point(tokens=record.consumed_tokens, flops=spent_before + record.flops, loss=record.loss)
        for record in sorted(stage_records, key=lambda record: record.iteration)
        if math.isfinite(record.loss)
    )


def _last(items: Iterable[_Item]) -> _Item | None:
    found = list(items)
    return found[-1] if found else None
