"""The growth record: which entries of a grown checkpoint are new, in a file small enough to read and to keep.

`growth.json` is stored in the grown checkpoint. It contains each axis once, as runs: target coordinates [start, stop)
that come from `source` on (or from none), and whether they are new. Every tensor then lists the axis of each of its
dimensions; together with the tensor table that gives the new entries of any tensor.

For operators that use a mask (`masked`, `progressive`), `raise` lists the spans that training raises from zero.
Shares and scales are in the runs too, so the maps can be rebuilt (`recorded_step`) without the operator that made them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.checkpoint.index import Box
from megagrow.checkpoint.tensors.table import TensorKind, source_kind, tensor_kinds
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json_object
from megagrow.growth.maps import (
    NO_SOURCE,
    AxisMap,
    ExpertMap,
    Flags,
    GrowthStep,
    HeadMap,
    Indices,
    Inside,
    LayerMap,
    Moments,
    Role,
    Silence,
)

GROWTH_RECORD = "growth.json"
NEW_PARAMETERS = "new_parameters.json"
"""Beside an export's growth record: the same by the format's own names."""
_MAX_BYTES = 64 << 20


def describe_step(step: GrowthStep) -> dict[str, Any]:
    """Return the content of a growth step's record."""
    axes = {
        "hidden": step.hidden,
        "ffn": step.ffn,
        "head": step.heads.head,
        "group": step.heads.group,
        "vocab": step.vocab,
    }
    if step.experts is not None:
        axes["expert"] = step.experts.expert
    if step.shared is not None:
        axes["shared"] = step.shared
    return {
        "format": 1,
        "source_shape": step.small.model_dump(exclude_defaults=True),
        "operators": step.operators,
        "moments": step.moments.value,
        "noise": step.noise,
        "shrink": step.shrink,
        "seed": step.seed,
        "exact": step.exact,
        "axes": {
            name: {"from": axis.size, "to": len(axis), "center": axis.center, "runs": axis_runs(axis)}
            for name, axis in axes.items()
        },
        "layers": {"from": step.layers.size, "to": len(step.layers), **_layers(step)},
        "raise": _raised(step, axes),
        "tensors": {kind.key: [dim.name for dim in kind.dims] for kind in tensor_kinds(step.large)},
    }


def write_growth_record(path: Path, step: GrowthStep) -> None:
    """Write the record into a (staging) checkpoint directory."""
    (path / GROWTH_RECORD).write_text(json.dumps(describe_step(step), indent=1))


def read_growth_record(path: Path) -> dict[str, Any] | None:
    """Return a record's content; None for a checkpoint that was not grown; CheckpointError if it is damaged."""
    file = path / GROWTH_RECORD
    if not file.is_file():
        return None
    content = read_json_object(file, _MAX_BYTES)
    if content.get("format") != 1:
        raise CheckpointError(f"{file}: not a growth record of format 1")
    return content


def axis_runs(axis: AxisMap) -> list[dict[str, Any]]:
    """Return an axis as runs of consecutive targets with consecutive sources (or none).

    All targets of a run are new or none is, and they have one share and one scale per role. A share or scale of 1 is
    left out.
    """
    source, new = axis.source, axis.new
    follows = np.where(
        source[1:] == NO_SOURCE, source[:-1] == NO_SOURCE, (source[:-1] != NO_SOURCE) & (source[1:] == source[:-1] + 1)
    )
    for values in (new, axis.share, *axis.scale.values()):
        follows &= values[1:] == values[:-1]
    breaks = np.flatnonzero(~follows) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(source)]
    return [_run(axis, start, stop) for start, stop in zip(starts, stops, strict=True)]


def _raised(step: GrowthStep, axes: dict[str, AxisMap]) -> dict[str, list[list[int]]]:
    """Return, by axis, the spans [start, stop) that training raises from zero: those of operators that use a mask."""
    flags = {name: axis.new for name, axis in axes.items()} | {"layer": np.array(step.layers.new)}
    group = flags["group"]
    spans: dict[str, list[list[int]]] = {}
    for axis in step.operators:
        if axis in step.masked:
            spans[axis] = spans_of(flags[axis])
            if axis == "head" and group.any():
                spans["group"] = spans_of(group)
    return spans


def spans_of(flags: Flags) -> list[list[int]]:
    """Return the spans [start, stop) in which flags are set."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()


def new_entries(
    content: dict[str, Any], kind: TensorKind, shape: ModelShape, layer: int | None, box: Box | None = None
) -> Flags:
    """Return which entries of one layer's tensor are new, as flags in the shape of the box.

    Args:
        content: the grown checkpoint's record.
        kind: the tensor's row of the table.
        shape: the grown model's shape.
        layer: the layer in the grown model, counted over all pipeline stages; None outside the layers.
        box: the part of that layer's whole tensor, such as a shard under any layout (a gated linear_fc1 is two boxes
            per tensor rank); None: all of it.
    """
    box = box or tuple((0, size) for size in kind.layer_shape(shape))
    flags = np.zeros([stop - start for start, stop in box], dtype=bool)
    if layer is not None and content["layers"]["new"][layer]:
        return ~flags
    step = recorded_step(content, shape)
    if source_kind(kind, step.small) is None:
        return ~flags
    for axis, (dim, (start, stop)) in enumerate(zip(kind.dims, box, strict=True)):
        new = dim.grow(step).new[start:stop]
        flags |= new.reshape([-1 if other == axis else 1 for other in range(len(box))])
    return flags


def copy_pairs(content: dict[str, Any], kind: TensorKind, shape: ModelShape) -> tuple[tuple[Indices, Indices], ...]:
    """Return, for each dimension of a kind, the indices of new copies, and of the old entry with the same source."""
    step = recorded_step(content, shape)
    if source_kind(kind, step.small) is None:
        return ()
    pairs = []
    for dim in (dim.grow(step) for dim in kind.dims):
        old = np.flatnonzero(~dim.new & (dim.source != NO_SOURCE))
        old_of = np.full(dim.size, NO_SOURCE)
        old_of[dim.source[old]] = old
        copies = np.flatnonzero(dim.new & (dim.source != NO_SOURCE))
        copies = copies[old_of[dim.source[copies]] != NO_SOURCE]
        pairs.append((copies, old_of[dim.source[copies]]))
    return tuple(pairs)


def recorded_step(content: dict[str, Any], large: ModelShape) -> GrowthStep:
    """Rebuild the maps of the growth step that made a checkpoint of shape `large`.

    The values that filled entries without a source are not recorded.

    Raises:
        CheckpointError: the record does not fit the shape.
    """
    try:
        _check_shape(content, large)
        layers, axes = content["layers"], {name: _axis(content["axes"][name]) for name in content["axes"]}
        return GrowthStep(
            small=ModelShape.model_validate(content["source_shape"]),
            large=large,
            hidden=axes["hidden"],
            ffn=axes["ffn"],
            heads=HeadMap(axes["head"], axes["group"]),
            layers=LayerMap(
                layers["from"],
                tuple(layers["source"]),
                tuple(layers["new"]),
                Silence(layers["silence"]),
                Inside(layers["inside"]),
            ),
            vocab=axes["vocab"],
            moments=Moments(content["moments"]),
            noise=content["noise"],
            shrink=content["shrink"],
            seed=content["seed"],
            exact=content["exact"],
            operators=content["operators"],
            masked=frozenset(content["raise"]) & set(content["operators"]),
            experts=ExpertMap(axes["expert"]) if "expert" in axes else None,
            shared=axes.get("shared"),
        )
    except KeyError as error:
        raise CheckpointError(
            f"{GROWTH_RECORD}: has no {error}: damaged, or written by an earlier megagrow; convert again"
        ) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{GROWTH_RECORD}: damaged: {type(error).__name__}: {error}") from None


def _check_shape(content: dict[str, Any], large: ModelShape) -> None:
    axes = content["axes"]
    sizes = (large.hidden_size, large.num_attention_heads, large.groups, large.num_layers)
    described = (*(axes[name]["to"] for name in ("hidden", "head", "group")), content["layers"]["to"])
    if sizes != described:
        raise CheckpointError(
            f"{GROWTH_RECORD}: belongs to another shape: hidden, heads, groups, layers {described}, here {sizes}"
        )


def _run(axis: AxisMap, start: int, stop: int) -> dict[str, Any]:
    source, share = axis.source[start], float(axis.share[start])
    run: dict[str, Any] = {
        "start": start,
        "stop": stop,
        "source": None if source == NO_SOURCE else int(source),
        "new": bool(axis.new[start]),
    }
    scale = {role.value: float(values[start]) for role, values in axis.scale.items() if values[start] != 1.0}
    return run | ({"share": share} if share != 1.0 else {}) | ({"scale": scale} if scale else {})


def _axis(described: dict[str, Any]) -> AxisMap:
    """Return an axis, rebuilt from its runs."""
    size = described["to"]
    source, new, share = np.full(size, NO_SOURCE), np.zeros(size, dtype=bool), np.ones(size)
    scale = {Role(name): np.ones(size) for run in described["runs"] for name in run.get("scale", ())}
    for run in described["runs"]:
        span = slice(run["start"], run["stop"])
        new[span], share[span] = run["new"], run.get("share", 1.0)
        if run["source"] is not None:
            source[span] = run["source"] + np.arange(run["stop"] - run["start"])
        for name, value in run.get("scale", {}).items():
            scale[Role(name)][span] = value
    return AxisMap(described["from"], source, new, share, scale, {}, center=described["center"])


def _layers(step: GrowthStep) -> dict[str, Any]:
    layers = step.layers
    return {
        "source": layers.source,
        "new": layers.new,
        "silence": layers.silence.value,
        "inside": layers.inside.value,
    }
