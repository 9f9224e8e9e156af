"""Whether chunks cover a tensor exactly once: like counting every value, in any number of dimensions, and fast."""

import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.index import Box, Chunk, DType, TensorInfo, check_cover, volume, whole_box
from megagrow.checkpoint.index.cover import covers
from megagrow.errors import CheckpointError


def divided(chance: random.Random, box: Box, parts: int) -> list[Box]:
    """Cut a box into at most so many, anywhere."""
    boxes = [box]
    for _ in range(parts - 1):
        cut = boxes.pop(chance.randrange(len(boxes)))
        long = [dim for dim, (start, stop) in enumerate(cut) if stop - start > 1]
        if not long:
            boxes.append(cut)
            continue
        dim = chance.choice(long)
        at = chance.randrange(cut[dim][0] + 1, cut[dim][1])
        boxes += [(*cut[:dim], half, *cut[dim + 1 :]) for half in ((cut[dim][0], at), (at, cut[dim][1]))]
    return boxes


def moved(chance: random.Random, boxes: list[Box], shape: tuple[int, ...]) -> list[Box]:
    """Move or exchange boxes: the number of values stays, what is covered may not."""
    changed = list(boxes)
    number = chance.randrange(len(changed))
    other = changed[chance.randrange(len(changed))]
    box = tuple(
        (start, start + stop - first) if start + stop - first <= size else (first, stop)
        for (first, stop), (start, _), size in zip(changed[number], other, shape, strict=True)
    )
    changed[number] = box
    return changed


def by_counting(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    counts = np.zeros(shape, np.int64)
    for box in boxes:
        counts[tuple(slice(start, stop) for start, stop in box)] += 1
    return bool((counts == 1).all())


def info(boxes: Sequence[Box], shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(shape, DType.FLOAT32, tuple(Chunk(box, "f", 0, 0) for box in boxes))


# issue 12: C11
@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=5), st.integers(1, 30), st.integers(0, 2), st.integers(0, 2**32))
def test_it_is_the_same_as_counting_every_value(lengths: list[int], parts: int, changes: int, seed: int) -> None:
    chance, shape = random.Random(seed), tuple(lengths)
    boxes = divided(chance, whole_box(shape), parts)
    for _ in range(changes):
        boxes = moved(chance, boxes, shape)
    chance.shuffle(boxes)
    right = by_counting(boxes, shape)
    assert covers("here", boxes, shape) == right
    if right:
        check_cover("here", info(boxes, shape))
    else:
        with pytest.raises(CheckpointError, match="overlap|values"):
            check_cover("here", info(boxes, shape))


# issue 12: C11
@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((4, 16_000), (1, 8000)),
        ((16_000, 4), (8000, 1)),
        ((128, 256), (64, 128)),
        ((2, 100, 2, 100), (1, 90, 1, 90)),
        ((2,) * 13, (2,) * 13),
        ((3, 8, 24, 40), (3, 8, 12, 20)),
    ],
)
def test_thousands_of_chunks_take_a_moment(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    edges = [[size * n // parts for n in range(parts + 1)] for size, parts in zip(shape, grid, strict=True)]
    boxes = list(itertools.product(*([*itertools.pairwise(each)] for each in edges)))
    assert len(boxes) > 5000
    started = time.process_time()
    check_cover("here", info(boxes, shape))
    wrong = [boxes[1], *boxes[1:]] if volume(boxes[0]) == volume(boxes[1]) else boxes[1:]
    with pytest.raises(CheckpointError, match="overlap|values"):
        check_cover("here", info(wrong, shape))
    assert time.process_time() - started < 8


# issue 12: C11
@pytest.mark.parametrize("dimensions", [2, 3, 6])
def test_cuts_without_any_order_take_not_much_longer(dimensions: int) -> None:
    chance, shape = random.Random(0), (1 << 20,) * dimensions
    boxes = divided(chance, whole_box(shape), 3000)
    started = time.process_time()
    check_cover("here", info(boxes, shape))
    assert time.process_time() - started < 20


# issue 12: C11
def test_a_scalar_and_an_empty_tensor() -> None:
    check_cover("here", info([()], ()))
    check_cover("here", info([((0, 0), (0, 3))], (0, 3)))
    check_cover("here", info([], (0, 3)))
    boxes: list[Any]
    for boxes in ([], [(), ()]):
        with pytest.raises(CheckpointError):
            check_cover("here", info(boxes, ()))
