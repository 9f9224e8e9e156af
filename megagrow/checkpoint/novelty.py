"""The what-is-new file: which entries of a grown checkpoint are new, small enough to read and to keep.

`growth.json` lies beside the grown checkpoint. It holds each axis once, as runs: target coordinates [start, stop)
that come from `source`.. on (or from none) and whether they are new. Every tensor then names, dimension by
dimension, the axis that it lies on; with the table of `names` that gives the new entries of any tensor.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.checkpoint.names import kinds
from megagrow.errors import CheckpointError
from megagrow.growth.axes import NO_SOURCE, AxisMap
from megagrow.growth.step import GrowthStep

FILE = "growth.json"


def describe(step: GrowthStep) -> dict[str, Any]:
    """The content of the file."""
    axes = {
        "hidden": step.hidden,
        "ffn": step.ffn,
        "head": step.heads.head,
        "group": step.heads.group,
        "vocab": step.vocab,
    }
    return {
        "format": 1,
        "operators": step.operators,
        "moments": step.moments.value,
        "noise": step.noise,
        "seed": step.seed,
        "exact": step.exact,
        "axes": {
            name: {"from": axis.size, "to": len(axis), "center": axis.center, "runs": runs(axis)}
            for name, axis in axes.items()
        },
        "layers": {"from": step.layers.size, "to": len(step.layers), **_layers(step)},
        "tensors": {kind.key: [dim.name for dim in kind.dims] for kind in kinds(step.large)},
    }


def write_novelty(path: Path, step: GrowthStep) -> None:
    """Write the file into a (staging) checkpoint directory."""
    (path / FILE).write_text(json.dumps(describe(step), indent=1))


def read_novelty(path: Path) -> dict[str, Any] | None:
    """Return the file's content; None for a checkpoint that was not grown; CheckpointError if it is damaged."""
    file = path / FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or content["format"] != 1:
            raise CheckpointError(f"{file}: not a what-is-new file of format 1")
        return content
    except (ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: damaged: {error}") from None


def runs(axis: AxisMap) -> list[dict[str, Any]]:
    """An axis as runs of consecutive targets with consecutive sources (or none) and one newness."""
    source, new = axis.source, axis.new
    follows = np.where(
        source[1:] == NO_SOURCE, source[:-1] == NO_SOURCE, (source[:-1] != NO_SOURCE) & (source[1:] == source[:-1] + 1)
    )
    breaks = np.flatnonzero(~(follows & (new[1:] == new[:-1]))) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(source)]
    return [
        {
            "start": start,
            "stop": stop,
            "source": None if source[start] == NO_SOURCE else int(source[start]),
            "new": bool(new[start]),
        }
        for start, stop in zip(starts, stops, strict=True)
    ]


def new_flags(content: dict[str, Any], axis: str) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """[N] newness of the coordinates of an axis, back from the file's content."""
    described = content["axes"][axis]
    flags = np.zeros(described["to"], dtype=bool)
    for run in described["runs"]:
        flags[run["start"] : run["stop"]] = run["new"]
    return flags


def _layers(step: GrowthStep) -> dict[str, Any]:
    layers = step.layers
    return {
        "source": layers.source,
        "new": layers.new,
        "silence": layers.silence.value,
        "inside": layers.inside.value,
    }
