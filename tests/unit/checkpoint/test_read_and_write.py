"""The torch_dist format: any slice reads back as written, and an impossible index is refused."""

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megagrow.checkpoint.formats.torch_dist.index_write import FORMAT
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index.box import Box
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.tensors.dimensions import qkv_rows
from megagrow.config import GrowthConfig, ModelShape
from megagrow.errors import CheckpointError
from megagrow.growth.maps.axis import NO_SOURCE
from megagrow.growth.operators.plan import plan_growth
from tools.reference.memory import MemoryStore
from tools.reference.torch_dist_writer import Writer


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def boxes_of(cuts: list[list[int]]) -> list[Box]:
    """The grid of boxes between cuts, the last dimension fastest."""
    result: list[Box] = [()]
    for edges in cuts:
        spans = list(zip(edges, edges[1:], strict=False))
        result = [(*box, span) for box in result for span in spans]
    return result


def put_boxes(target: Any, key: str, values: Tensor, boxes: list[Box]) -> None:
    for box in boxes:
        part = values[tuple(slice(start, stop) for start, stop in box)]
        target.put(key, tuple(values.shape), tuple(start for start, _ in box), part)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Tensor, list[Box], Box]:
    """A tensor, its boxes in any order, and a box to read."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    values = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    read = [(start := draw(st.integers(0, size - 1)), draw(st.integers(start + 1, size))) for size in shape]
    return values, draw(st.permutations(boxes_of(cuts))), tuple(read)


@settings(max_examples=60, deadline=None)
@given(case=cut_tensors())
def test_any_slice_of_any_chunking_reads_back(case: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    values, boxes, box = case
    path = tmp_path_factory.mktemp("cut")
    writer, memory = Writer(path), MemoryStore()
    for store in (writer, memory):
        put_boxes(store, "w", values, boxes)
        store.put_object("extra", [None])
    writer.finish({"iteration": 3})
    reader = TorchDistReader(path)
    wanted = values[tuple(slice(start, stop) for start, stop in box)]
    readable: tuple[TorchDistReader | MemoryStore, ...] = (reader, memory)
    for source in readable:
        found = source.read("w", box)
        assert found.dtype == values.dtype and torch.equal(found, wanted)
        assert source.tensors["w"].shape == tuple(values.shape) and source.tensors["w"].dtype is DType.of(values.dtype)
        assert source.tensors["w"].bytes == values.numel() * values.itemsize
    assert torch.equal(reader.read_whole("w"), values)
    assert reader.read_object("extra") == [None] and reader.common() == {"iteration": 3}
    assert len(reader.tensors["w"].chunks) == len(boxes)


def test_a_writer_starts_a_new_file_when_one_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.reference.torch_dist_writer.MAX_FILE_BYTES", 5000)
    writer = Writer(tmp_path)
    values = torch.randn(8, 100)
    put_boxes(writer, "w", values, boxes_of([list(range(9)), [0, 100]]))
    writer.finish({})
    files = sorted(tmp_path.glob("*.distcp"))
    assert len(files) > 1 and all(file.stat().st_size < 10000 for file in files)
    assert torch.equal(TorchDistReader(tmp_path).read_whole("w"), values)


def test_nothing_is_a_checkpoint_before_finish(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.put("w", (2,), (0,), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing"):
        TorchDistReader(tmp_path)


def save_by_torch(path: Path, state: dict[str, Any]) -> None:
    writer = dcp.FileSystemWriter(path)
    dcp.save(state, storage_writer=writer, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    (path / "metadata.json").write_text(json.dumps(FORMAT))
    torch.save({"iteration": 5}, path / "common.pt")


def test_what_torch_itself_writes_is_read(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "_extra_state/shard_0_1": [None],
    }
    save_by_torch(tmp_path, state)
    reader = TorchDistReader(tmp_path)
    assert set(reader.tensors) == {"a", "b"} and set(reader.objects) == {"_extra_state/shard_0_1"}
    assert torch.equal(reader.read_whole("a"), state["a"]) and torch.equal(reader.read_whole("b"), state["b"])
    assert torch.equal(reader.read("a", ((1, 3), (2, 4))), state["a"][1:3, 2:4])
    assert reader.read_object("_extra_state/shard_0_1") == [None] and reader.common()["iteration"] == 5


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    values = torch.randn(4, 6)
    writer = Writer(tmp_path)
    put_boxes(writer, "w", values, boxes_of([[0, 1, 4], [0, 5, 6]]))
    writer.finish({})
    state = {"w": torch.zeros(4, 6)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(state["w"], values)


# An impossible index


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """One tensor `w` [4, 6] in four chunks and an object."""
    writer = Writer(tmp_path / "stored")
    (tmp_path / "stored").mkdir()
    put_boxes(writer, "w", torch.randn(4, 6), boxes_of([[0, 2, 4], [0, 3, 6]]))
    writer.put_object("o", [None])
    writer.finish({})
    return tmp_path / "stored"


def rewrite_index(path: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _place(metadata: Metadata, key: str = "w", **fields: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == key)
    metadata.storage_data[index] = replace(metadata.storage_data[index], **fields)


def _tensor(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata["w"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def _chunk(metadata: Metadata, number: int, **fields: Any) -> None:
    """Change a chunk's offsets or sizes, but not its place in the file."""
    chunks = _tensor(metadata).chunks
    before = chunks[number]
    chunks[number] = replace(before, **{name: torch.Size(value) for name, value in fields.items()})
    metadata.storage_data[MetadataIndex("w", chunks[number].offsets)] = metadata.storage_data[
        MetadataIndex("w", before.offsets)
    ]


def _drop(metadata: Metadata) -> None:
    del _tensor(metadata).chunks[1]


def _repeat(metadata: Metadata) -> None:
    chunks = _tensor(metadata).chunks
    chunks.append(chunks[0])


def _repeat_instead(metadata: Metadata) -> None:
    chunks = _tensor(metadata).chunks
    chunks[1] = chunks[0]


def _fields(metadata: Metadata, **fields: Any) -> None:
    metadata.state_dict_metadata["w"] = replace(_tensor(metadata), **fields)


WRONG: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "up and out": (lambda m: _place(m, relative_path="../stolen"), r"refused: points outside.*\.\./stolen"),
    "absolute": (lambda m: _place(m, relative_path="/etc/hostname"), "refused: points outside.*/etc/hostname"),
    "below": (lambda m: _place(m, relative_path="sub/file"), "sub/file: missing"),
    "object outside": (lambda m: _place(m, "o", relative_path="../stolen"), "refused: points outside"),
    "the parent": (lambda m: _place(m, relative_path=".."), "refused: points outside"),
    "a zero byte": (lambda m: _place(m, relative_path="a\0b"), "is no file name"),
    "no name": (lambda m: _place(m, relative_path=7), r"\.metadata: damaged.*a file name is 7"),
    "another file": (lambda m: _place(m, relative_path="__9_9.distcp"), r"__9_9\.distcp: missing"),
    "behind the end": (lambda m: _place(m, offset=10**6), r"\.distcp: cut short: \d+ bytes, its index needs 100\d+"),
    "too long": (lambda m: _place(m, length=10**6), "cut short"),
    "too short": (lambda m: _place(m, length=8), "damaged.*does not fit in 8 bytes"),
    "before the file": (lambda m: _place(m, offset=-5), "damaged.*are not sizes"),
    "no number": (lambda m: _place(m, offset=1.5), "damaged.*are not sizes"),
    "missing": (_drop, "its chunks hold 18 of 24 values"),
    "twice": (_repeat, "its chunks hold 30 of 24 values"),
    "one twice, one missing": (_repeat_instead, r"chunks \[0:2, 0:3\] and \[0:2, 0:3\] overlap"),
    "overlapping": (lambda m: _chunk(m, 3, offsets=(2, 2)), r"chunks \[2:4, 0:3\] and \[2:4, 2:5\] overlap"),
    "outside": (lambda m: _chunk(m, 3, offsets=(3, 3)), r"chunk \[3:5, 3:6\] is outside \(4, 6\)"),
    "other dimensions": (lambda m: _chunk(m, 3, sizes=(2, 3, 1)), "damaged"),
    "fewer dimensions": (lambda m: _fields(m, size=torch.Size([24])), "is outside"),
    "huge": (lambda m: _chunk(m, 3, sizes=(2**40, 2**40)), "does not fit in"),
    "no dtype": (lambda m: _fields(m, properties=None), "damaged"),
    "no place": (lambda m: m.storage_data.clear(), "damaged: KeyError"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", None), "damaged: TypeError: None is not"),
    "no key": (lambda m: cast(Any, m.state_dict_metadata).update({3: m.state_dict_metadata.pop("w")}), "a key is 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_index_is_refused(stored: Path, case: str) -> None:
    (stored.parent / "stolen").write_bytes(b"x" * 10**6)
    change, message = WRONG[case]
    rewrite_index(stored, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        TorchDistReader(stored)
    assert str(stored) in str(caught.value) and "\n" not in str(caught.value)


def test_a_chunk_that_contradicts_the_index_is_refused(stored: Path) -> None:
    def swap(metadata: Metadata) -> None:
        _place(metadata, **vars(metadata.storage_data[MetadataIndex("o")]))

    def retype(metadata: Metadata) -> None:
        properties = replace(_tensor(metadata).properties, dtype=torch.int32)
        _fields(metadata, properties=properties)

    original = (stored / ".metadata").read_bytes()
    rewrite_index(stored, swap)
    with pytest.raises(CheckpointError, match=r"\.distcp: w: contains list, not a tensor"):
        TorchDistReader(stored).read_whole("w")
    (stored / ".metadata").write_bytes(original)
    rewrite_index(stored, retype)
    with pytest.raises(CheckpointError, match=r"w: contains \(2, 3\) float32, not \(2, 3\) int32"):
        TorchDistReader(stored).read_whole("w")
    (stored / ".metadata").write_bytes(original)
    rewrite_index(stored, _turn)
    with pytest.raises(CheckpointError, match=r"w: contains \(2, 3\) float32, not \(3, 2\)"):
        TorchDistReader(stored).read_whole("w")
    with pytest.raises(CheckpointError, match="no tensor v"):
        TorchDistReader(stored).read("v", whole((4, 6)))


def _turn(metadata: Metadata) -> None:
    """Make the index claim that the tensor was [6, 4]."""
    _fields(metadata, size=torch.Size([6, 4]))
    for number, offsets in enumerate([(0, 0), (0, 2), (3, 0), (3, 2)]):
        _chunk(metadata, number, offsets=offsets, sizes=(3, 2))


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt"])
def test_a_directory_without_one_of_the_formats_files_names_it(stored: Path, name: str) -> None:
    (stored / name).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete torch_dist checkpoint: {name} is missing"):
        TorchDistReader(stored)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        TorchDistReader(stored / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged: KeyError"),
        (json.dumps(FORMAT | {"sharded_backend": "zarr"}), "format zarr version 1; only torch_dist version 1 is read"),
        (json.dumps(FORMAT | {"sharded_backend_version": 2}), "format torch_dist version 2"),
    ],
)
def test_another_format_is_named(stored: Path, text: str, message: str) -> None:
    (stored / "metadata.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        TorchDistReader(stored)


def test_common_that_holds_something_else_is_refused(stored: Path) -> None:
    torch.save([1, 2], stored / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: holds list, not keys and values"):
        TorchDistReader(stored).common()


# Row order of linear_qkv, written out by hand


def rows_by_hand(groups: int, per_group: int, dim: int) -> dict[tuple[str, int, int, int], int]:
    """Row of each (part, group, head in the group, channel)."""
    rows: dict[tuple[str, int, int, int], int] = {}
    for group in range(groups):
        for head in range(per_group):
            rows |= {("q", group, head, channel): len(rows) + channel for channel in range(dim)}
        for part in ("k", "v"):
            rows |= {(part, group, 0, channel): len(rows) + channel for channel in range(dim)}
    return rows


@pytest.mark.parametrize("operator", ["zero_pad", "balanced"])
@pytest.mark.parametrize(
    ("groups", "per_group", "more_groups", "more_per_group"),
    [(1, 1, 2, 1), (1, 1, 1, 3), (2, 1, 3, 2), (2, 3, 4, 3), (3, 2, 5, 5), (2, 2, 2, 2)],
)
def test_qkv_rows_are_those_of_a_construction_by_hand(
    operator: str, groups: int, per_group: int, more_groups: int, more_per_group: int
) -> None:
    def shape(groups: int, per_group: int) -> ModelShape:
        return ModelShape(
            num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=groups * per_group, kv_channels=4,
            num_query_groups=groups, vocab_size=8, seq_length=8,
        )  # fmt: skip

    small, large = shape(groups, per_group), shape(more_groups, more_per_group)
    found = qkv_rows(plan_growth(small, large, GrowthConfig(head=operator), seed=0))
    before, after = rows_by_hand(groups, per_group, 4), rows_by_hand(more_groups, more_per_group, 4)
    source, new = np.empty(len(after), dtype=int), np.empty(len(after), dtype=bool)
    for (part, group, head, channel), row in after.items():
        copied = group >= groups or head >= per_group
        from_place = (part, group % groups, head % per_group, channel)
        source[row] = NO_SOURCE if copied and operator == "zero_pad" else before[from_place]
        new[row] = copied
    assert found.size == len(before)
    assert np.array_equal(found.source, source) and np.array_equal(found.new, new)
    assert (found.scale == 1).all()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """torch.save to a path would raise a RuntimeError that does not mention the disk."""
    writer = Writer(tmp_path)
    writer.put("w", (2,), (0,), torch.ones(2))
    (tmp_path / "common.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        writer.finish({})
    assert not (tmp_path / "metadata.json").exists()
