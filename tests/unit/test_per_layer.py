"""A checkpoint with a key for each layer is the same checkpoint."""

from pathlib import Path

import pytest
import torch

from megagrow.checkpoint import directory
from megagrow.checkpoint.expand import Target, expand
from megagrow.checkpoint.names import kinds
from megagrow.checkpoint.torch_dist import Reader, Writer
from megagrow.checkpoint.verify import verify
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.errors import CheckpointError
from tests.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint
from tests.unit.test_expand import read_all


def unstacked(stacked: Path, save: Path, *, drop: str = "") -> Path:
    """The same checkpoint with `decoder.layers.{i}.x` keys, each tensor in two chunks."""
    path = save / stacked.name
    path.mkdir(parents=True)
    reader, writer = Reader(stacked), Writer(path)
    for key in reader.tensors:
        values = reader.read_whole(key)
        parts = {key: values}
        if "decoder.layers." in key:
            parts = {key.replace("layers.", f"layers.{layer}."): one for layer, one in enumerate(values)}
        for name, one in parts.items():
            half = one.shape[0] // 2
            for start, part in ((0, one[:half]), (half, one[half:])) if name != drop else ():
                writer.put(name, tuple(one.shape), (start, *[0] * (one.dim() - 1)), part)
    writer.finish(reader.common())
    for name in ("megagrow.json",):
        (path / name).write_bytes((stacked / name).read_bytes())
    directory.seal(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "stacked", shape(SMALL), random_state(shape(SMALL)))


def test_it_reads_verifies_and_grows_like_the_stacked_one(source: Path, tmp_path: Path) -> None:
    other = unstacked(source, tmp_path / "numbered")
    assert set(Reader(other).tensors) == set(Reader(source).tensors)
    assert verify(other).faults == []
    one, two = read_all(source), read_all(other)
    assert all(torch.equal(one[key], two[key]) for key in one)
    target = Target("large", shape(LARGE), ParallelLayout(), GrowthConfig(), "fp32", 7)
    grown = []
    for place, path in (("a", source), ("b", other)):
        expand(path, tmp_path / place, target)
        grown.append(read_all(tmp_path / place / "iter_0000000"))
    assert all(torch.equal(grown[0][key], grown[1][key]) for key in grown[0])


def test_a_missing_layer_is_named(source: Path, tmp_path: Path) -> None:
    key = next(kind.key for kind in kinds(shape(SMALL)) if kind.per_layer)
    lost = key.replace("layers.", "layers.0.")
    other = unstacked(source, tmp_path / "numbered", drop=lost)
    target = Target("large", shape(LARGE), ParallelLayout(), GrowthConfig(), "fp32", 7)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        expand(other, tmp_path / "save", target)
