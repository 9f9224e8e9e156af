"""Boxes, which are rectangular parts of a tensor, and their arithmetic."""

import math
from collections.abc import Iterable, Iterator

Box = tuple[tuple[int, int], ...]
"""Start and stop in every dimension of a global tensor."""


def whole_box(shape: Iterable[int]) -> Box:
    """The box that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """A box's length in every dimension."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of values in a box."""
    return math.prod(stop - start for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """The box that two boxes share; None if they share nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(a < b for a, b in common) else None


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in values, of a tensor that is stored row by row."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * shape[dim]
    return tuple(strides)


def split_evenly(box: Box, count: int) -> Iterator[Box]:
    """Cut a box into `count` even parts, or fewer, along its first dimension that is longer than 1."""
    dim = next((dim for dim, (start, stop) in enumerate(box) if stop - start > 1), 0)
    start, stop = box[dim] if box else (0, 1)
    count = min(count, stop - start)
    if count <= 1:
        yield box
        return
    for index in range(count):
        first, last = (start + (stop - start) * at // count for at in (index, index + 1))
        yield (*box[:dim], (first, last), *box[dim + 1 :])


def split_by_volume(box: Box, values: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `values` values that follow one another in row-major order."""
    if volume(box) <= values:
        yield box
        return
    dim = next(number for number, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[dim]
    step = max(1, values * (stop - start) // volume(box))
    for at in range(start, stop, step):
        yield from split_by_volume((*box[:dim], (at, min(at + step, stop)), *box[dim + 1 :]), values)


def slice_text(box: Box) -> str:
    """A box in slice notation: `[0:4, 2:8]`."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
