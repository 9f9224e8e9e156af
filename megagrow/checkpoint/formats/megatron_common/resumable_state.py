"""What Megatron-LM needs besides tensors to go on with a checkpoint: rates, schedule, arguments and counts.

Source: Megatron-LM core_v0.16.1, `training/checkpointing.py` (`load_checkpoint`, `load_args_from_checkpoint`), and
Megatron-Core 0.16.1, `optimizer_param_scheduler.py` (`OptimizerParamScheduler.get_lr`, `load_state_dict`).
"""

from collections.abc import Mapping
from typing import Any

_RATES = ("max_lr", "min_lr")
_SCHEDULER, _FLOPS = "opt_param_scheduler", "num_floating_point_operations_so_far"


def without_rates(optimizer: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return an optimizer's unsharded state whose ordinary parameter groups name no learning rates.

    Megatron-LM's scheduler takes a group's own `max_lr` and `min_lr` where it has them, and the run's elsewhere. Those
    of the run that saved a checkpoint would beat the `--lr` of the one that loads it. Decoupled groups keep theirs.
    """
    if "optimizer" not in optimizer:  # chained, by number
        return {key: without_rates(each) if isinstance(each, Mapping) else each for key, each in optimizer.items()}
    inner = optimizer["optimizer"]
    if not isinstance(inner, Mapping) or not isinstance(groups := inner.get("param_groups"), list):
        return dict(optimizer)
    kept = [
        group if group.get("is_decoupled_lr") else {key: each for key, each in group.items() if key not in _RATES}
        for group in groups
    ]
    return {**optimizer, "optimizer": {**inner, "param_groups": kept}}


def schedule_state(
    *, max_lr: float, min_lr: float, style: str, warmup: int, iterations: int, done: int, samples: int, decay: float
) -> dict[str, Any]:
    """Return the state of Megatron-LM's `OptimizerParamScheduler`, which counts steps in samples.

    Args:
        max_lr, min_lr: peak and last learning rate.
        style: of the decay, by Megatron-LM's name.
        warmup, iterations, done: steps of warm-up, of the whole schedule, and taken so far.
        samples: of a step.
        decay: weight decay, the same at all steps.
    """
    return {
        "max_lr": max_lr,
        "lr_warmup_steps": warmup * samples,
        "num_steps": done * samples,
        "lr_decay_style": style,
        "lr_decay_steps": iterations * samples,
        "min_lr": min_lr,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": iterations * samples,
    }


def at_schedule_start(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the unsharded state at step 0 of its schedule: that of a grown model begins anew, its moments do not."""
    found = {key: each for key, each in common.items() if key != _FLOPS}
    scheduler = found.get(_SCHEDULER)
    if isinstance(scheduler, dict):
        found[_SCHEDULER] = {**scheduler, **{key: 0 for key in ("num_steps", "num_iters") if key in scheduler}}
    return found


def resumable(
    common: Mapping[str, Any], arguments: Any, scheduler: Mapping[str, Any] | None, flops: float
) -> dict[str, Any]:
    """Return the unsharded state with what Megatron-LM reads.

    Args:
        common: the state, with `iteration`.
        arguments: the Namespace of `carried_arguments`.
        scheduler: as `schedule_state` makes it; None keeps the one in `common`, if any.
        flops: spent so far, where `common` does not say.
    """
    found = {"checkpoint_version": 3.0, _FLOPS: flops, **common, "args": arguments}
    return found if scheduler is None else {**found, _SCHEDULER: dict(scheduler)}
