"""How long each stage trains, and how much compute the family saves.

Everything follows from one identity: *the budget of a model trained alone equals what the family has spent once
that model is finished*, C_i = sum of f_j T'_j over j <= i, with f the FLOPs per token and T' the tokens of a stage
(arXiv 2504.00623). Read forwards, it gives the tokens: a model alone would train T_i = tokens_per_parameter * N_i,
so C_i = f_i T_i, which leaves its stage T'_i = (C_i - C_(i-1)) / f_i. Read backwards, it gives the comparison for
tokens that a user set or a run actually took: the model alone would have had C_i, so T_i = C_i / f_i. Either way,
training all models alone costs the sum of the C_i and the family costs only the last, so the saving is
1 - C_n / sum of C_i. Stages with explicit and automatic tokens may be mixed.

A first stage that begins with a checkpoint brings its past for nothing: what was spent on it before is sunk and counted
nowhere. One that is taken as finished has no tokens, no cost, and no share in the comparison.

FLOPs per token are 6 N ("6NT", with the nominal N if one is set) or the exact count. `family.budget.rule` selects
the one that the identity uses; costs and savings are reported by both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from megagrow.config import Family, ModelShape
from megagrow.errors import ConfigError
from megagrow.plan.flops import flops_per_token, six_n
from megagrow.plan.learning_rate import peak_lr
from megagrow.plan.parameters import budget_parameters, count_parameters

Rule = Literal["6NT", "exact"]


@dataclasses.dataclass(frozen=True)
class Flops:
    """Training FLOPs by both rules, with addition and scaling by tokens."""

    six_nt: float = 0.0
    exact: float = 0.0

    def by(self, rule: Rule) -> float:
        """FLOPs by one rule."""
        return self.six_nt if rule == "6NT" else self.exact

    def __add__(self, other: "Flops") -> "Flops":
        """Sum by each rule."""
        return Flops(self.six_nt + other.six_nt, self.exact + other.exact)

    def __mul__(self, tokens: float) -> "Flops":
        """FLOPs per token times tokens."""
        return Flops(self.six_nt * tokens, self.exact * tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The numbers of a stage. `*_independent`: for the same model trained alone, on its whole budget. `load`: the
    checkpoint that it begins with, whose cost is not in any of the numbers.
    """

    name: str
    parameters: int
    active_parameters: int
    nominal_parameters: float | None
    load: str | None
    layout: str
    world_size: int
    peak_lr: float
    tokens: int
    tokens_independent: float
    tokens_per_step: int
    flops_per_token: Flops

    @property
    def iterations(self) -> int:
        """Optimizer steps: whole steps, rounded down, at least one; 0 for a stage that is loaded as finished."""
        return max(1, self.tokens // self.tokens_per_step) if self.tokens else 0

    @property
    def flops(self) -> Flops:
        """Cost of the stage within the family."""
        return self.flops_per_token * self.tokens

    @property
    def flops_independent(self) -> Flops:
        """Cost of the same model trained alone."""
        return self.flops_per_token * self.tokens_independent


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """All stages, with totals; `rule` is the one that the budget uses."""

    name: str
    rule: Rule
    stages: tuple[StagePlan, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the family trains on, each once, in one stream."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def tokens_independent(self) -> float:
        """Tokens that all models together would take if trained alone."""
        return sum(stage.tokens_independent for stage in self.stages)

    @property
    def flops(self) -> Flops:
        """Cost of the family."""
        return sum((stage.flops for stage in self.stages), Flops())

    @property
    def flops_independent(self) -> Flops:
        """Cost of all models trained alone."""
        return sum((stage.flops_independent for stage in self.stages), Flops())

    def saving(self, rule: Rule | None = None) -> float:
        """Share of the independent cost that the family saves (0.247: 24.7 %), by default by the budget's rule."""
        rule = rule or self.rule
        independent = self.flops_independent.by(rule)
        return 1 - self.flops.by(rule) / independent if independent else 0.0


def family_plan(family: Family) -> FamilyPlan:
    """Return the plan of a family; ConfigError if the budget leaves a stage no tokens."""
    return price(family, _tokens(family))


def price(family: Family, tokens: Sequence[int]) -> FamilyPlan:
    """Return the plan of the first `len(tokens)` stages, trained on exactly these tokens.

    With the tokens that a run actually took, it holds the cost and the saving so far.
    """
    rule = family.budget.rule
    stages, spent = [], 0.0
    for index, taken in enumerate(tokens):
        stage = family.stages[index]
        per_token = _flops(stage.model)
        spent += per_token.by(rule) * taken
        count = count_parameters(stage.model)
        plan = StagePlan(
            name=stage.name,
            parameters=count.total,
            active_parameters=count.active,
            nominal_parameters=stage.model.nominal_parameters,
            load=None if stage.load is None else str(stage.load),
            layout=stage.parallel.describe(),
            world_size=stage.parallel.world_size,
            peak_lr=peak_lr(family, index),
            tokens=taken,
            tokens_independent=spent / per_token.by(rule),
            tokens_per_step=stage.tokens_per_step,
            flops_per_token=per_token,
        )
        stages.append(plan)
    return FamilyPlan(name=family.name, rule=rule, stages=tuple(stages))


def _tokens(family: Family) -> list[int]:
    """Tokens of every stage: none if loaded as finished, those set, or what its budget leaves after earlier stages."""
    tokens, spent = [], 0.0
    for index, stage in enumerate(family.stages):
        per_token = _flops(stage.model).by(family.budget.rule)
        if stage.finished:
            taken = 0
        elif stage.train_tokens == "auto":
            own = per_token * family.budget.tokens_per_parameter * budget_parameters(stage.model)
            if own <= spent:
                raise ConfigError(
                    f"stages.{index} ({stage.name!r}): its own budget of {own:.3g} FLOPs ({family.budget.rule}) does "
                    f"not exceed the {spent:.3g} that the stages before it spend, so it has no tokens left; make the "
                    f"model larger, raise budget.tokens_per_parameter, or set stages.{index}.train_tokens"
                )
            taken = max(1, round((own - spent) / per_token))
        else:
            taken = stage.train_tokens
        tokens.append(taken)
        spent += per_token * taken
    return tokens


def _flops(shape: ModelShape) -> Flops:
    return Flops(six_nt=six_n(shape), exact=float(flops_per_token(shape).total))
