"""The unsharded state of a Megatron checkpoint: iteration, arguments, and the optimizer's parameter groups.

Every format's optimizer is described as Megatron-Core describes a fully reshardable one, because that is how its
tensors are read. An optimizer that cannot be read is refused with the option that leaves it out.
"""

from collections.abc import Mapping
from typing import Any

from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep, Moments

_SHARDING = "param_state_sharding_type"
_FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_SPELLING_SETTINGS = ("singleton_local_shards", "non_homogeneous_layers")
"""Settings that only change how keys are spelled; canonical tensors do not depend on them."""


def optimizer_refusal(where: object, reason: str) -> CheckpointError:
    """Return the error for an optimizer that cannot be read while the weights can: it names the way out."""
    return CheckpointError(f"{where}: {reason}; --no-optimizer leaves it out")


def canonical_common(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the unsharded state as a checkpoint with a fully reshardable optimizer contains it."""
    result = dict(common)
    optimizer = result.get("optimizer")
    if isinstance(optimizer, dict):
        is_chained = bool(optimizer) and all(isinstance(number, int) for number in optimizer)
        result["optimizer"] = (
            {number: _canonical_optimizer(each) for number, each in optimizer.items()}
            if is_chained
            else _canonical_optimizer(optimizer)
        )
    if isinstance(content := result.get("content_metadata"), dict):
        kept = {name: value for name, value in content.items() if name not in _SPELLING_SETTINGS}
        result["content_metadata"] = {**kept, **_FULLY_RESHARDABLE}
    return result


def _canonical_optimizer(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """One optimizer's groups and settings; torch's own Adam keeps its step outside the groups, so move it inside."""
    inner = dict(optimizer.get("optimizer", optimizer))
    state = inner.pop("state", None)
    step = state.get("common_step") if isinstance(state, dict) else None
    if step is not None and isinstance(groups := inner.get("param_groups"), list):
        inner["param_groups"] = [{"step": int(step), **group} for group in groups]
    rest = {name: value for name, value in optimizer.items() if name == "grad_scaler"}
    inner = {name: value for name, value in inner.items() if name not in ("grad_scaler", _SHARDING)}
    return {"optimizer": inner, **rest, _SHARDING: _FULLY_RESHARDABLE["distrib_optim_sharding_type"]}


def grown_common(common: Mapping[str, Any], step: GrowthStep) -> dict[str, Any]:
    """Return the unsharded state of a stage's first checkpoint: iteration 0, and Adam's step 0 if it was reset."""
    if not step.operators:
        return dict(common)
    grown = {**common, "iteration": 0}
    optimizer = grown.get("optimizer")
    if step.moments is Moments.RESET and isinstance(optimizer, dict):
        grown["optimizer"] = _at_step_0(optimizer)
    return grown


def _at_step_0(optimizer: dict[Any, Any]) -> dict[Any, Any]:
    """Parameter groups as before the first step; with expert parallelism there are two optimizers, by number."""
    if "optimizer" not in optimizer:
        return {index: _at_step_0(each) for index, each in optimizer.items()}
    inner = dict(optimizer["optimizer"])
    inner["param_groups"] = [{**group, "step": 0} for group in inner["param_groups"]]
    return {**optimizer, "optimizer": inner}
