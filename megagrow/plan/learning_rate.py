"""The learning rate of any step of any stage, as a pure function.

Each stage ends as a finished model, so each has a complete schedule: a linear warm-up to its peak, and a decay that
reaches `min_lr_ratio * peak_lr` at its last step. The peak falls as the family grows, because larger models need
smaller rates (arXiv 2504.00623). No state is kept between steps, so a resumed run gets the same rates.
"""

import math

from megagrow.config import Family, Schedule
from megagrow.plan.parameters import budget_parameters


def peak_lr(family: Family, index: int) -> float:
    """Return the peak learning rate of a stage: its own `max_lr`, or by the family's rule.

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


def learning_rate(schedule: Schedule, peak_lr: float, iteration: int, iterations: int) -> float:
    """Return the learning rate of the step about to be taken.

    `iteration` counts from 0 within a stage of `iterations` steps. Warm-up over w steps starts at peak_lr / w (a rate
    of 0 would waste the first step) and reaches peak_lr at step w - 1. From there, cosine and linear decay to the last
    step; WSD keeps the peak and decays linearly over the last `lr_wsd_decay_fraction` of the stage; constant keeps it.
    The last step has exactly min_lr_ratio * peak_lr, except for constant and for a stage of a single step, which have
    peak_lr. Beyond the last step, the rate stays the same.
    """
    assert iteration >= 0 and iterations > 0, f"iteration {iteration} of {iterations}"
    last = iterations - 1
    warmup = min(round(schedule.lr_warmup_fraction * iterations), last)
    if iteration < warmup:
        return peak_lr * (iteration + 1) / warmup
    peak_step = max(warmup - 1, 0)
    if schedule.lr_decay_style == "constant" or last == peak_step:
        return peak_lr
    start = peak_step
    if schedule.lr_decay_style == "WSD":
        start = max(peak_step, last - max(1, round(schedule.lr_wsd_decay_fraction * iterations)))
    done = min(max(iteration - start, 0) / (last - start), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.lr_decay_style == "cosine" else 1 - done
    min_lr = schedule.min_lr_ratio * peak_lr
    return min_lr + (peak_lr - min_lr) * left
