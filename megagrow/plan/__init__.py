"""The cost of a family before anything runs: parameters, FLOPs, token budgets, learning rates.

Pure functions of a checked `Family`: no files, no torch, well under a second on a login node. The trainer, the
launcher and the report all use them, so a number that appears in several places is computed in one.
"""

from megagrow.plan.budget import FamilyPlan, Flops, Rule, StagePlan, family_plan, price
from megagrow.plan.flops import FlopsPerToken, flops_per_token, six_n
from megagrow.plan.learning_rate import learning_rate, peak_lr
from megagrow.plan.parameters import ParameterCount, budget_parameters, count_parameters

__all__ = [
    "FamilyPlan",
    "Flops",
    "FlopsPerToken",
    "ParameterCount",
    "Rule",
    "StagePlan",
    "budget_parameters",
    "count_parameters",
    "family_plan",
    "flops_per_token",
    "learning_rate",
    "peak_lr",
    "price",
    "six_n",
]
