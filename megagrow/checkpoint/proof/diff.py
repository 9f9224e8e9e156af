"""Compares two checkpoints of any format, tensor by tensor, in boxes of bounded size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from megagrow.checkpoint.index import Source, TensorInfo, split_by_volume, volume, whole_box

Verdict = Literal["equal", "differs", "other shape", "only in the first", "only in the second"]
_VALUES = 2 << 20
"""Values of each checkpoint that are compared at a time."""


@dataclass(frozen=True)
class Difference:
    """How one tensor of two checkpoints compares.

    Attributes:
        key: the tensor's canonical key.
        verdict: `equal` bit for bit (after widening, if the types differ), or what differs.
        largest: largest absolute difference.
        where: index of the largest difference.
        relative: norm of the difference over the norm of the first tensor.
        differing: number of values that differ.
        values: number of values compared.
        types: both types if they differ, or both shapes.
    """

    key: str
    verdict: Verdict
    largest: float = 0.0
    where: tuple[int, ...] = ()
    relative: float = 0.0
    differing: int = 0
    values: int = 0
    types: str = ""


def compare_checkpoints(
    one: Source, other: Source, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Difference]:
    """Yield the comparison of every tensor of either, by key; `progress` gets (tensors done, tensors in all)."""
    first, second = one.tensors, other.tensors
    keys = sorted({*first, *second})
    for done, key in enumerate(keys, start=1):
        if key not in second:
            yield Difference(key, "only in the first")
        elif key not in first:
            yield Difference(key, "only in the second")
        elif first[key].shape != second[key].shape:
            yield Difference(key, "other shape", types=f"{first[key].shape}, {second[key].shape}")
        else:
            yield _compare(key, one, other, first[key], second[key])
        progress(done, len(keys))


def _compare(key: str, one: Source, other: Source, first: TensorInfo, second: TensorInfo) -> Difference:
    extent = whole_box(first.shape)
    values = volume(extent)
    types = "" if first.dtype == second.dtype else f"{first.dtype}, {second.dtype}"
    if not types and all(
        torch.equal(one.read(key, box), other.read(key, box)) for box in split_by_volume(extent, _VALUES)
    ):
        return Difference(key, "equal", values=values)
    where: tuple[int, ...] = ()
    largest, differing = 0.0, 0
    squares = reference = 0.0
    for box in split_by_volume(extent, _VALUES):
        a, b = one.read(key, box).double(), other.read(key, box).double()
        unequal = (a != b) & ~(a.isnan() & b.isnan())
        apart = torch.where(unequal, (a - b).abs(), 0.0).nan_to_num(nan=torch.inf)
        reference += float(a.square().sum())
        squares += float(apart.square().sum())
        if float(apart.max()) > largest:
            largest = float(apart.max())
            index = torch.unravel_index(apart.argmax(), apart.shape)
            where = tuple(start + int(at) for (start, _), at in zip(box, index, strict=True))
        differing += int(unequal.sum())
    relative = (squares / reference) ** 0.5 if reference else (torch.inf if squares else 0.0)
    verdict: Verdict = "differs" if differing else "equal"
    return Difference(key, verdict, largest, where, relative, differing, values, types)
