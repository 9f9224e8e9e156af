"""The planner of strided reads, without a file: plans fill every result once, and stay within the policy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.index import Chunk
from megagrow.checkpoint.reading.strided import (
    BufferedRead,
    DirectRead,
    Read,
    ReadPolicy,
    StridedBox,
    chunks_by_layer,
    plan_reads,
    strided_box,
)

SIZE = 4
"""Bytes of a value in these tests."""


def plan(boxes: Sequence[StridedBox], shape: tuple[int, ...], **policy: int) -> list[Read]:
    return list(plan_reads(boxes, shape, SIZE, ReadPolicy(**policy)))


def carry_out(reads: Sequence[Read], shape: tuple[int, ...], file: np.ndarray) -> np.ndarray:
    """Do a plan's reads on values in memory; each value of the result may be written only once."""
    result, written = np.zeros(shape, np.int32), np.zeros(shape, int)
    for read in reads:
        assert read.offset % SIZE == 0 == read.length % SIZE and read.offset + read.length <= file.size * SIZE
        values = file[read.offset // SIZE :][: read.length // SIZE]
        if isinstance(read, DirectRead):
            place = slice(read.into // SIZE, (read.into + read.length) // SIZE)
            result.reshape(-1)[place] = values
            written.reshape(-1)[place] += 1
            continue
        for box in read.boxes:
            assert read.offset <= box.offset and box.offset + box.span * SIZE <= read.offset + read.length
            first, steps = (box.offset - read.offset) // SIZE, [stride * SIZE for stride in box.strides]
            part = np.lib.stride_tricks.as_strided(values[first:], box.lengths, steps)
            region: Any = (*box.region, ...)
            result[region] = part
            written[region] += 1
    assert (written == 1).all()
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[StridedBox], np.ndarray, np.ndarray]:
    """A part of a permuted tensor in a file with gaps, cut in two: shape of the result, boxes, file, and the truth."""
    stored = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    order = draw(st.permutations(range(len(stored))))
    file = np.arange(int(np.prod(stored)), dtype=np.int32)
    whole = file.reshape(stored).transpose(order)
    spans = [(start := draw(st.integers(0, n - 1)), draw(st.integers(start + 1, n))) for n in whole.shape]
    truth = whole[tuple(slice(start, stop) for start, stop in spans)]
    strides = tuple(step // SIZE for step in whole.strides)
    box = StridedBox((0,) * truth.ndim, truth.shape, "f", int(truth.reshape(-1)[0]) * SIZE, strides)
    dim = draw(st.integers(0, truth.ndim - 1))
    cut = draw(st.integers(0, truth.shape[dim]))
    pieces = [box.narrow(dim, start, stop - start, SIZE) for start, stop in ((0, cut), (cut, truth.shape[dim]))]
    return truth.shape, [piece for piece in pieces if 0 not in piece.lengths], file, truth


@given(cases(), st.sampled_from([4, 16, 64, 1 << 20]), st.integers(1, 4), st.sampled_from([0, 8, 1 << 20]))
@settings(max_examples=400, deadline=None)
def test_a_plan_fills_the_result_once_and_stays_within_the_policy(
    case: tuple[tuple[int, ...], list[StridedBox], np.ndarray, np.ndarray], block: int, max_waste: int, read_cost: int
) -> None:
    shape, boxes, file, truth = case
    reads = plan(boxes, shape, block=block, max_waste=max_waste, read_cost=read_cost)
    assert np.array_equal(carry_out(reads, shape, file), truth)
    for read in reads:
        if isinstance(read, BufferedRead):
            assert read.length <= block
            wanted = SIZE * sum(int(np.prod(box.lengths)) for box in read.boxes)
            assert read.length <= max_waste * wanted or len(read.boxes) > 1


def test_values_in_the_order_of_the_result_are_read_directly_whatever_their_size() -> None:
    box = StridedBox((2, 0), (3, 8), "f", 40, (8, 1))
    assert plan([box], (6, 8), block=4) == [DirectRead("f", 40, 3 * 8 * SIZE, into=2 * 8 * SIZE)]


def test_a_scalar_is_one_direct_read() -> None:
    assert plan([StridedBox((), (), "f", 12, ())], ()) == [DirectRead("f", 12, SIZE, into=0)]


def test_small_gaps_are_read_and_large_ones_skipped() -> None:
    near, far = (StridedBox((0, 0), (3, 2), "f", 0, (stride, 1)) for stride in (5, 100))
    assert plan([near], (3, 2)) == [BufferedRead("f", 0, 12 * SIZE, (near,))]
    assert plan([far], (3, 2)) == [DirectRead("f", row * 100 * SIZE, 2 * SIZE, into=row * 2 * SIZE) for row in range(3)]


def test_a_box_larger_than_the_buffer_is_read_some_rows_at_a_time() -> None:
    transposed = StridedBox((0, 0), (4, 10), "f", 0, (1, 4))
    reads = plan([transposed], (4, 10), block=4 * 4 * SIZE)
    assert [(read.offset, read.length) for read in reads] == [(0, 64), (64, 64), (128, 32)]


def test_boxes_that_alternate_share_reads_where_a_row_costs_less_than_the_reads() -> None:
    boxes = [StridedBox((first, 0), (2, 10), "f", first * SIZE, (1, 8)) for first in (0, 2, 4, 6)]
    (shared,) = plan(boxes, (8, 10))
    assert isinstance(shared, BufferedRead) and shared.boxes == tuple(boxes) and shared.length == 80 * SIZE
    apart = plan(boxes, (8, 10), read_cost=8 * SIZE // len(boxes) - 1)
    assert all(len(read.boxes) == 1 for read in apart if isinstance(read, BufferedRead)) and len(apart) >= len(boxes)


def test_boxes_of_different_files_or_one_after_another_do_not_share_reads() -> None:
    boxes = [
        StridedBox((at, 0), (2, 3), file, 0 if at != 2 else 24, (1, 2)) for at, file in ((0, "f"), (2, "f"), (4, "g"))
    ]
    reads = plan(list(reversed(boxes)), (6, 3))
    assert [(read.path, read.offset) for read in reads] == [("f", 0), ("f", 24), ("g", 0)]


def test_plans_are_lazy() -> None:
    endless = StridedBox((0, 0), (1 << 60, 1), "f", 0, (100, 1))
    reads = plan_reads([endless], (1 << 60, 1), SIZE, ReadPolicy())
    assert next(reads) == DirectRead("f", 0, SIZE, into=0)


def test_the_part_of_a_chunk_that_meets_a_box_is_found_in_file_and_result() -> None:
    chunk = Chunk(((2, 6), (0, 8)), "f", 0, 0)
    part = strided_box(chunk, ((3, 6), (4, 8)), ((3, 9), (4, 9)), 1000, (8, 1), SIZE)
    assert part == StridedBox((0, 0), (3, 4), "f", 1000 + (8 + 4) * SIZE, (8, 1))


def test_chunks_are_grouped_by_layer_unless_one_is_thick() -> None:
    chunks = [Chunk(((first, stop), (0, 1)), "f", 0, 0) for first, stop in ((0, 2), (2, 3), (1, 3))]
    assert chunks_by_layer(chunks, 3) == {0: [chunks[0]], 1: [chunks[0], chunks[2]], 2: [chunks[1], chunks[2]]}
    assert chunks_by_layer(chunks, 2) == {}
