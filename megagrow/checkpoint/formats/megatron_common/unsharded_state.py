"""The unsharded state of a Megatron checkpoint: iteration, arguments, and the optimizer's parameter groups.

Every format's optimizer is described as Megatron-Core describes a fully reshardable one, because that is how its
tensors are read. An optimizer that cannot be read is refused with the option that leaves it out.

Megatron-Core has one optimizer for the dense parameters and, only with expert parallelism, a second one for the
experts, chained after it. Its loader expects exactly the optimizers and groups of its own layout, though the tensors
fit any. So a conversion describes them anew for the target's layout (`common_of_layout`).

Source: Megatron-Core 0.16.1, `optimizer/__init__.py` (`get_megatron_optimizer`, `_get_param_groups`),
`optimizer/optimizer.py` (`ChainedOptimizer`) and `optimizer/distrib_optimizer.py` (`load_state_dict`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megagrow.checkpoint.formats.megatron_common.resumable_state import without_rates
from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep, Moments

_SHARDING = "param_state_sharding_type"
_FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_GROUP_DEFAULTS = {"lr_mult": 1.0, "is_decoupled_lr": False}
"""What a parameter group has besides `wd_mult` where its writer, or an older Megatron-LM, recorded nothing else."""
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
    """Return the unsharded state of a grown model, with Adam's step at 0 if the moments are reset."""
    if not step.operators:
        return dict(common)
    grown = dict(common)
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


def common_of_layout(common: Mapping[str, Any], where: object, *, experts_apart: bool) -> dict[str, Any]:
    """Return the unsharded state with the optimizer as Megatron-Core has it in a layout.

    Args:
        common: unsharded state of a checkpoint with an optimizer, in the layout that wrote it.
        where: the checkpoint, for errors.
        experts_apart: whether experts have an optimizer of their own in the layout.

    Raises:
        CheckpointError: the state does not describe an optimizer, or not the group that experts belong to.
    """
    saved = common.get("optimizer")
    parts = _optimizers(saved) if isinstance(saved, dict) else []
    if not parts or not all(isinstance(part.get("optimizer"), dict) for part in parts):
        raise optimizer_refusal(where, "its unsharded state has no parameter groups of the optimizer")
    dense, experts = _groups(parts)
    if experts_apart:
        experts = experts or [{**_group_of_matrices(dense, where), "is_expert_parallel": True}]
    else:
        dense += [
            {**group, "is_expert_parallel": False} for group in experts if _identity(group) not in map(_identity, dense)
        ]
    states = [
        without_rates(_described(parts[0], groups)) for groups in ([dense, experts] if experts_apart else [dense])
    ]
    return {
        **common,
        "optimizer": dict(enumerate(states)) if experts_apart else states[0],
        "content_metadata": {**(common.get("content_metadata") or {}), **_FULLY_RESHARDABLE},
    }


def _optimizers(saved: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return the states of chained optimizers in order, or the state of the only one."""
    if all(isinstance(number, int) for number in saved):
        return [saved[number] for number in sorted(saved)]
    return [dict(saved)]


def _described(first: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an optimizer's state with these groups, and all else as in the first optimizer of the source."""
    state = {**first, "optimizer": {**first["optimizer"], "param_groups": groups}}
    return {**state, _SHARDING: _FULLY_RESHARDABLE["distrib_optim_sharding_type"]}


def _groups(parts: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the parameter groups of dense parameters and those of experts in an optimizer of their own.

    All are at one step. A group without parameters on the rank that saved it does not count steps, so the largest
    number is that of all.
    """
    found: list[dict[str, Any]] = []
    for group in (group for part in parts for group in part["optimizer"].get("param_groups", ())):
        kept = {name: value for name, value in group.items() if name != "params"}
        if "wd_mult" in kept or "pre_wd_mult" in kept:  # NeMo writes the latter
            found.append(kept)
        else:  # not Megatron's: it keeps matrices, which decay, apart from norms and biases
            found += [{**kept, "wd_mult": 1.0}, {**kept, "wd_mult": 0.0}]
    steps = [int(group["step"]) for group in found if group.get("step") is not None]
    groups = [_complete(group, max(steps, default=None)) for group in found]
    dense, experts = (
        list({_identity(each): each for each in groups if each["is_expert_parallel"] == flag}.values())
        for flag in (False, True)
    )
    return dense, experts


def _complete(group: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Return a group with everything by which Megatron-Core recognizes it, and its step."""
    missing = {name: value for name, value in _GROUP_DEFAULTS.items() if not {name, f"pre_{name}"} & set(group)}
    flag = {"is_expert_parallel": bool(group.get("is_expert_parallel", False))}
    return {**group, **missing, **flag, **({} if step is None else {"step": step})}


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What sets a group apart from others, besides whether it is of experts."""
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in ("wd_mult", *_GROUP_DEFAULTS))


def _group_of_matrices(dense: Sequence[dict[str, Any]], where: object) -> dict[str, Any]:
    """Return the group of a layer's weight matrices, to which experts belong where they have no optimizer."""
    for group in dense:
        weight_decay, learning_rate, is_decoupled = _identity(group)
        if (weight_decay, learning_rate, is_decoupled) == (1.0, 1.0, False):
            return group
    raise optimizer_refusal(
        where, f"none of its {len(dense)} parameter groups has wd_mult 1 and lr_mult 1, as the group of experts must"
    )
