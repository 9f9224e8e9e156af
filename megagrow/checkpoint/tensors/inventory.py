"""Checks that an index has exactly the tensors of a shape."""

import re
from collections.abc import Mapping
from typing import Any

from megagrow.checkpoint.index import TensorInfo
from megagrow.checkpoint.tensors.table import OPTIMIZER_STATES, optimizer_key, tensor_kinds
from megagrow.errors import CheckpointError

_STATE = re.compile(r"^optimizer\.state\.([^.]+)\.")


def model_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return an index without the optimizer's tensors."""
    return {key: info for key, info in tensors.items() if not key.startswith("optimizer.")}


def _check_states(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError, by name, if an optimizer keeps other states than Adam's."""
    found = {match[1] for key in tensors if (match := _STATE.match(key))}
    other = sorted(found - set(OPTIMIZER_STATES))
    if other:
        name = "Muon or SGD" if "momentum_buffer" in other else "an optimizer other than Adam"
        raise CheckpointError(
            f"its optimizer is {name}, which keeps {', '.join(other)}; supported are Adam's states, "
            f"{', '.join(OPTIMIZER_STATES)}; --no-optimizer leaves it out"
        )


def check_tensors(tensors: Mapping[str, TensorInfo], shape: Any, *, optimizer: bool) -> None:
    """Raise CheckpointError unless an index has every tensor of a shape, in its global shape, and no other."""
    wanted: dict[str, tuple[int, ...]] = {}
    for kind in tensor_kinds(shape):
        for key in (kind.key, *(optimizer_key(state, kind.key) for state in OPTIMIZER_STATES if optimizer)):
            wanted[key] = kind.global_shape(shape)
    if optimizer:
        _check_states(tensors)
    if missing := sorted(set(wanted) - set(tensors)):
        raise CheckpointError(f"{len(missing)} tensors are missing, first {missing[0]}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise CheckpointError(f"{len(unknown)} tensors that this shape does not have, first {unknown[0]}")
    for key, expected in wanted.items():
        if tensors[key].shape != expected:
            raise CheckpointError(f"{key} has shape {tensors[key].shape}, the model's is {expected}")
