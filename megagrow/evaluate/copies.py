"""Measures whether copies diverge from their sources: their cosine after some Adam steps with the checkpoint's moments.

Copies with equal shares and moments get equal updates forever: width without new features, the symmetry lock of
SPARKLING (arXiv 2602.02472). Updates are compared as well as weights, whose cosine falls slowly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megagrow.checkpoint.tensors import copy_pairs, tensor_kinds
from megagrow.config import ModelShape, Schedule
from megagrow.evaluate.live import LiveModel
from megagrow.records import CopiesRow
from megagrow.runtime.adam import Adam


def resume_adam(model: LiveModel, schedule: Schedule, learning_rate: float, steps: int) -> Adam:
    """Create Adam as configured for training, with the checkpoint's moments, after `steps` steps."""
    matrices = [parameter for parameter in model.parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters.values() if parameter.dim() == 1]
    groups = [{"params": matrices, "step": steps}, {"params": vectors, "step": steps, "weight_decay": 0.0}]
    optimizer = Adam(
        groups,
        lr=learning_rate,
        betas=(schedule.adam_beta1, schedule.adam_beta2),
        eps=schedule.adam_eps,
        weight_decay=schedule.weight_decay,
    )
    for address, parameter in model.parameters.items():
        optimizer.state[parameter] = {state: model.moment(state, address) for state in ("exp_avg", "exp_avg_sq")}
    return optimizer


def copy_similarity(
    content: dict[str, Any], shape: ModelShape, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[CopiesRow, ...]:
    """Compute the mean cosine between copies and their sources, by axis.

    Args:
        content: the child's growth record.
        shape: shape of the child.
        before, after: weights of the child by canonical key, layers stacked, before and after the steps.
    """
    cosines: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for kind in tensor_kinds(shape):
        updates = after[kind.key] - before[kind.key]
        values = [(after[kind.key], updates)]
        if kind.per_layer:
            old = [layer for layer, new in enumerate(content["layers"]["new"]) if not new]
            values = [(after[kind.key][layer], updates[layer]) for layer in old]
        if len(kind.dims) < 2:
            continue  # a single number per coordinate has no direction
        if kind.per_layer and len(pairs := _layer_pairs(content)):
            new, old_layers = pairs.unbind(1)
            parts = (_cosines(after[kind.key], 0, new, old_layers), _cosines(updates, 0, new, old_layers))
            cosines.setdefault("layer", []).append(parts)
        for axis, (copies, sources) in enumerate(copy_pairs(content, kind, shape)):
            if len(copies):
                copied, source = torch.from_numpy(copies), torch.from_numpy(sources)
                name = kind.dims[axis].name.split(":")[0]
                cosines.setdefault(name, []).extend(
                    (_cosines(weights, axis, copied, source), _cosines(changes, axis, copied, source))
                    for weights, changes in values
                )
    return tuple(_row(axis, parts) for axis, parts in cosines.items())


def _layer_pairs(content: dict[str, Any]) -> Tensor:
    """Pairs of a new layer that is a copy and the old layer with the same source, [pairs, 2]."""
    layers = content["layers"]
    old = {source: layer for layer, source in enumerate(layers["source"]) if not layers["new"][layer]}
    copied = [layer for layer, new in enumerate(layers["new"]) if new and layers["inside"] == "copy"]
    pairs = [(layer, old[layers["source"][layer]]) for layer in copied if layers["source"][layer] in old]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _cosines(values: Tensor, axis: int, one: Tensor, other: Tensor) -> Tensor:
    """Cosine between slices at indices `one` and `other` along an axis; NaN where a slice is zero."""
    slices = values.movedim(axis, 0).flatten(1)
    return F.cosine_similarity(slices[one], slices[other], dim=1, eps=0.0)


def _row(axis: str, parts: list[tuple[Tensor, Tensor]]) -> CopiesRow:
    weights, updates = (torch.cat(values) for values in zip(*parts, strict=True))
    changed = updates[updates.isfinite()]
    mean = float(weights[weights.isfinite()].mean()) if weights.isfinite().any() else 0.0
    return CopiesRow(
        axis=axis, copies=len(weights), weights=mean, updates=float(changed.mean()) if len(changed) else None
    )
