"""What of a Megatron checkpoint is not sharded: iteration, parameter groups, settings."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from collections.abc import Mapping

from megagrow.growth.maps import GrowthStep, Moments


def unlisted(value: Any) -> Any:
    """An object out of the list in which Megatron-Core keeps each."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


_SHARDING = "param_state_sharding_type"
_FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_SETTINGS_OF_SPELLING = ("singleton_local_shards", "non_homogeneous_layers")


def canonical_common(common: Mapping[str, Any]) -> dict[str, Any]:
    """What is not sharded of a checkpoint of any spelling, as one has it whose optimizer is fully reshardable."""
    result = dict(common)
    optimizer = result.get("optimizer")
    if isinstance(optimizer, dict):
        parts = bool(optimizer) and all(isinstance(number, int) for number in optimizer)
        result["optimizer"] = (
            {number: _canonical_part(part) for number, part in optimizer.items()}
            if parts
            else _canonical_part(optimizer)
        )
    if isinstance(content := result.get("content_metadata"), dict):
        kept = {name: value for name, value in content.items() if name not in _SETTINGS_OF_SPELLING}
        result["content_metadata"] = {**kept, **_FULLY_RESHARDABLE}
    return result


def _canonical_part(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """One optimizer's groups and settings; torch's own Adam keeps the step beside its groups, in fp32 on top."""
    inner = dict(optimizer.get("optimizer", optimizer))
    state = inner.pop("state", None)
    step = state.get("common_step") if isinstance(state, dict) else None
    if step is not None and isinstance(groups := inner.get("param_groups"), list):
        inner["param_groups"] = [{"step": int(step), **group} for group in groups]
    rest = {name: value for name, value in optimizer.items() if name == "grad_scaler"}
    inner = {name: value for name, value in inner.items() if name not in ("grad_scaler", _SHARDING)}
    return {"optimizer": inner, **rest, _SHARDING: _FULLY_RESHARDABLE["distrib_optim_sharding_type"]}


def grown_common(common: Mapping[str, Any], step: GrowthStep) -> dict[str, Any]:
    """What is not sharded, for the first checkpoint of the next stage: iteration 0, and no steps after a reset."""
    if not step.operators:
        return dict(common)
    grown = {**common, "iteration": 0}
    optimizer = grown.get("optimizer")
    if step.moments is Moments.RESET and isinstance(optimizer, dict):
        grown["optimizer"] = _at_step_0(optimizer)
    return grown


def _at_step_0(optimizer: dict[Any, Any]) -> dict[Any, Any]:
    """Parameter groups as before the first step; under expert parallelism there are two optimizers, by number."""
    if "optimizer" not in optimizer:
        return {index: _at_step_0(part) for index, part in optimizer.items()}
    inner = dict(optimizer["optimizer"])
    inner["param_groups"] = [{**group, "step": 0} for group in inner["param_groups"]]
    return {**optimizer, "optimizer": inner}
