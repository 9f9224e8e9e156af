"""Checks that the chunks of a tensor cover it exactly once.

A sum of boxes is zero everywhere if and only if its change along the first dimension is, at every coordinate where a
box begins or ends; and such a change is a sum of boxes with one dimension less. So the chunks, minus the whole tensor,
are followed from dimension to dimension. Where the tensor is cut as a grid, the faces of neighbors cancel at once, and
the time is that of n log n. Cuts without any order cost up to twice as much for each further dimension.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

from megagrow.checkpoint.index.box import Box, intersect, slice_text, volume, whole_box
from megagrow.checkpoint.index.index import TensorInfo
from megagrow.errors import CheckpointError

_MOST_FACES = 1 << 24
_MOST_PAIRS = 1 << 18
"""Faces that are followed before a tensor is refused, and pairs that are looked at to name two that overlap."""


def check_cover(where: str, info: TensorInfo) -> None:
    """Raise CheckpointError unless the chunks cover a tensor exactly once."""
    boxes = [chunk.box for chunk in info.chunks]
    for box in boxes:
        if len(box) != len(info.shape) or any(b > size for (_, b), size in zip(box, info.shape, strict=True)):
            raise CheckpointError(f"{where}: chunk {slice_text(box)} is outside {info.shape}")
    held, wanted = sum(map(volume, boxes)), math.prod(info.shape)
    if held != wanted:
        raise CheckpointError(f"{where}: its chunks hold {held} of {wanted} values")
    if not covers(where, boxes, info.shape):
        raise CheckpointError(f"{where}: {_overlap(boxes)}")


def covers(where: str, boxes: Iterable[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes cover a tensor exactly once; CheckpointError if they are too many and without any order."""
    counts: dict[Box, int] = {whole_box(shape): -1}
    for box in boxes:
        counts[box] = counts.get(box, 0) + 1
    followed = 0

    def is_zero(counts: Mapping[Box, int]) -> bool:
        """Whether boxes, each taken so many times, add up to zero everywhere."""
        nonlocal followed
        left = {box: count for box, count in counts.items() if count and all(start < stop for start, stop in box)}
        if not left or not next(iter(left)):
            return not left
        followed += len(left)
        if followed > _MOST_FACES:
            raise CheckpointError(f"{where}: refused: it is cut into too many chunks without any order")
        changes = sorted(_changes(left).items())
        return all(
            is_zero(change) for _, change in changes[:-1]
        )  # all changes together are zero, so one may be left out

    return is_zero(counts)


def _changes(counts: Mapping[Box, int]) -> dict[int, dict[Box, int]]:
    """Return the changes of a sum of boxes along the first dimension: at each coordinate, boxes of the others."""
    changes: dict[int, dict[Box, int]] = {}
    for ((start, stop), *rest), count in counts.items():
        face = tuple(rest)
        for at, change in ((start, count), (stop, -count)):
            there = changes.setdefault(at, {})
            there[face] = there.get(face, 0) + change
    return changes


def _overlap(boxes: Iterable[Box]) -> str:
    """Name two boxes that overlap, if they are found soon."""
    for looked_at, (one, other) in enumerate(_near_pairs(boxes)):
        if intersect(one, other):
            return f"chunks {slice_text(one)} and {slice_text(other)} overlap"
        if looked_at > _MOST_PAIRS:
            break
    return "its chunks overlap"


def _near_pairs(boxes: Iterable[Box]) -> Iterator[tuple[Box, Box]]:
    """Yield the pairs of boxes that meet in the first dimension."""
    near: list[Box] = []
    for box in sorted(boxes):
        near = [other for other in near if not box or other[0][1] > box[0][0]]
        yield from ((other, box) for other in near)
        near.append(box)
