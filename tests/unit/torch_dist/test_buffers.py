"""Flat buffers: boxes of a range are exactly that range, and parameters are packed by Megatron's own rule."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.formats.megatron_common.buffers import BufferRange, boxes_of_range, bucket_layout
from megagrow.errors import CheckpointError


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@settings(max_examples=200, deadline=None)
@given(ranges())
def test_boxes_of_a_range_cover_its_values_once_and_in_order(case: Any) -> None:
    shape, start, stop = case
    values = torch.arange(math.prod(shape)).view(shape)
    found = boxes_of_range(shape, start, stop)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    seen: list[int] = []
    for box, before in found:
        assert before == len(seen)
        # a box is read with the strides of the whole tensor, so the values it skips are outside the range
        inside = values[tuple(slice(a, b) for a, b in box)]
        assert inside.flatten()[0] == start + before
        seen += inside.flatten().tolist()
    assert seen == list(range(start, stop))


def test_parameters_are_packed_backwards_at_multiples_of_64() -> None:
    buckets = bucket_layout([100, 64, 10])
    assert buckets.ranges == (BufferRange(0, 128, 228), BufferRange(0, 64, 128), BufferRange(0, 0, 10))
    assert buckets.sizes == (228,) and buckets.joined() == buckets


def test_a_bucket_is_closed_when_it_is_large_enough() -> None:
    buckets = bucket_layout([5, 70, 30, 40], bucket_size=90)
    assert buckets.sizes == (94, 133) and buckets.joined().sizes == (227,)
    assert [each.start for each in buckets.joined().ranges] == [
        each.start + 94 * each.bucket for each in buckets.ranges
    ]
    assert buckets.ranges == (
        BufferRange(1, 128, 133),
        BufferRange(1, 0, 70),
        BufferRange(0, 64, 94),
        BufferRange(0, 0, 40),
    )


def test_shared_embeddings_have_buckets_of_their_own() -> None:
    first = bucket_layout([50, 70, 30], own_bucket={0})  # first pipeline stage: the embedding comes last, after a gap
    assert first.ranges == (BufferRange(1, 0, 50), BufferRange(0, 64, 134), BufferRange(0, 0, 30)) and first.sizes == (
        192,
        50,
    )
    last = bucket_layout([70, 30, 50], own_bucket={2})  # last pipeline stage: the output layer comes first
    assert last.ranges == (BufferRange(1, 64, 134), BufferRange(1, 0, 30), BufferRange(0, 0, 50)) and last.sizes == (
        50,
        134,
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(1, 500), st.data())
def test_recorded_bucket_sizes_replace_the_bucket_size_limit(
    sizes: list[int], bucket_size: int, data: st.DataObject
) -> None:
    own_bucket = data.draw(st.sets(st.sampled_from([0, len(sizes) - 1])))
    made = bucket_layout(sizes, own_bucket=own_bucket, bucket_size=bucket_size)
    assert bucket_layout(sizes, own_bucket=own_bucket, known_sizes=made.sizes) == made
    assert sum(each.stop - each.start for each in made.ranges) == sum(sizes)
    assert all(each.start % 64 == 0 and each.stop <= made.sizes[each.bucket] for each in made.ranges)


@pytest.mark.parametrize("known_sizes", [(227,), (228, 1), (), (128, 99)])
def test_sizes_that_do_not_match_exactly_are_refused(known_sizes: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"3 parameters fill buckets of \[.*\] values, not of"):
        bucket_layout([100, 64, 10], known_sizes=known_sizes)
