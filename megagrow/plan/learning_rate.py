"""The learning rate of any step of any stage, as a pure function.

Each stage is a finished model, so each has a whole schedule of its own: a linear warm-up to its maximum and a
decay that reaches `min_lr_ratio * max_lr` at its last step. The maximum falls as the family grows, because larger
models want smaller rates (arXiv 2504.00623). Nothing is remembered between steps, so a resumed run
cannot go wrong here.
"""

import math

from megagrow.config import Family, Schedule
from megagrow.plan.parameters import budget_parameters


def max_lr(family: Family, index: int) -> float:
    """Return the peak of a stage: its own `max_lr`, or the family's rule.

    The power rule is reference * (N / N_ref) ** -exponent with N as in the 6NT rule; N_ref defaults to the N of
    the first stage.
    """
    stage, rule = family.stages[index], family.learning_rate
    if stage.schedule.max_lr is not None:
        return stage.schedule.max_lr
    if rule.rule == "constant":
        return rule.reference
    reference_parameters = rule.reference_parameters or budget_parameters(family.stages[0].model)
    return rule.reference * math.pow(budget_parameters(stage.model) / reference_parameters, -rule.exponent)


def learning_rate(schedule: Schedule, max_lr: float, iteration: int, iterations: int) -> float:
    """Return the rate of the step about to be taken.

    `iteration` counts from 0 within a stage of `iterations` steps. Warm-up over w steps gives the first one
    max_lr / w (a rate of 0 would waste it) and step w - 1 max_lr itself. From there cosine and linear fall to the
    last step; WSD stays up and falls linearly over the last `lr_wsd_decay_fraction` of the stage; constant stays.
    The last step has min_lr_ratio * max_lr exactly, except for constant and for a stage of a single step, which
    has max_lr. Beyond the last step the rate stays.
    """
    assert iteration >= 0 and iterations > 0, f"iteration {iteration} of {iterations}"
    last = iterations - 1
    warmup = min(round(schedule.lr_warmup_fraction * iterations), last)
    if iteration < warmup:
        return max_lr * (iteration + 1) / warmup
    peak = max(warmup - 1, 0)
    if schedule.lr_decay_style == "constant" or last == peak:
        return max_lr
    start = peak
    if schedule.lr_decay_style == "WSD":
        start = max(peak, last - max(1, round(schedule.lr_wsd_decay_fraction * iterations)))
    done = min(max(iteration - start, 0) / (last - start), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.lr_decay_style == "cosine" else 1 - done
    min_lr = schedule.min_lr_ratio * max_lr
    return min_lr + (max_lr - min_lr) * left
