"""Slices of chunks whose values alternate in a file: right whatever the slice, and read together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.index.index import Chunk, TensorInfo
from megagrow.checkpoint.reading.chunk_reader import ChunkReader
from megagrow.checkpoint.reading.strided import BLOCK, ReadPolicy

HEADS, WIDTH, ROWS, START = 4, 6, 50, 24
"""A fused, transposed weight: `ROWS` rows of the file, each with q of every head, then k, then v."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChunkReader, torch.Tensor]:
    """A reader of such a file, and what it must read: head by head its q, k and v, the rows of the file as columns."""
    root = tmp_path_factory.mktemp("files")
    return reader(root, ROWS), expected(root)


def reader(root: Path, rows: int) -> ChunkReader:
    """Write such a file and open it."""
    values = torch.arange(rows * 3 * HEADS * WIDTH, dtype=torch.float32)
    (root / "data").write_bytes(b"\0" * START + values.numpy().tobytes())
    columns = 3 * HEADS * WIDTH
    chunks = []
    for head in range(HEADS):
        for part in range(3):
            first = (3 * head + part) * WIDTH
            box = ((first, first + WIDTH), (0, rows))
            begin = (part * HEADS + head) * WIDTH
            chunks.append(
                Chunk(box, "data", START, rows * columns * 4, archive=False, strides=(1, columns), start=begin)
            )
    info = TensorInfo((columns, rows), DType.FLOAT32, tuple(chunks))
    return ChunkReader(root, {"qkv": info}, {})


def expected(root: Path) -> torch.Tensor:
    """The whole tensor, rearranged by numpy."""
    values = np.frombuffer((root / "data").read_bytes()[START:], np.float32)
    heads = values.reshape(-1, 3, HEADS, WIDTH).transpose(2, 1, 3, 0)
    return torch.from_numpy(heads.reshape(3 * HEADS * WIDTH, -1).copy())


bounds = st.tuples(st.integers(0, 3 * HEADS * WIDTH), st.integers(0, 3 * HEADS * WIDTH)).map(sorted)
within = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(sorted)


@given(bounds, within, st.sampled_from([0, 200, 1 << 12, 4 << 20]), st.sampled_from([0, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_any_slice_is_right(
    stored: tuple[ChunkReader, torch.Tensor], rows: list[int], columns: list[int], block: int, read_cost: int
) -> None:
    reader_, whole = stored
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_, "_policy", ReadPolicy(block=max(block, 4), read_cost=read_cost))
        read = reader_.read("qkv", ((rows[0], rows[1]), (columns[0], columns[1])))
    assert torch.equal(read, whole[slice(*rows), slice(*columns)])


def test_all_heads_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 4 * BLOCK // (3 * HEADS * WIDTH * 4)
    opened, asked = reader(tmp_path, rows), []
    read = opened._files.read

    def noted(*given: Any) -> Any:
        asked.append(len(given[2]))
        return read(*given)

    monkeypatch.setattr(opened._files, "read", noted)
    assert torch.equal(opened.read_whole("qkv"), expected(tmp_path))
    assert len(asked) <= 5 and sum(asked) == rows * 3 * HEADS * WIDTH * 4
