"""A conversion gives the same bits for any number of workers and any layout of the target."""

from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.proof.verify import verify
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.convert.work import RunOptions
from megagrow.errors import CheckpointError
from tests.unit.convert.test_convert import read_all
from tools.reference.tiny_checkpoint import LARGE, random_state, shape, write_checkpoint

SMALL = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 4}
BIG = {**LARGE, "num_layers": 4, "ffn_hidden_size": 24, "num_attention_heads": 8, "num_query_groups": 4}


def wanted(layout: ParallelLayout, growth: GrowthConfig) -> TargetSpec:
    large = shape(BIG, vocab_size=32, make_vocab_size_divisible_by=4)
    return TargetSpec(stage="large", shape=large, layout=layout, growth=growth, precision="fp32", seed=7)


def options(workers: int, *, contents: bool = True) -> RunOptions:
    return RunOptions(contents=contents, workers=workers, memory=4 << 30)  # the test process is large


def grown(source: Path, save: Path, *, workers: int = 1, tensor: int = 1, pipeline: int = 1) -> dict[str, torch.Tensor]:
    layout = ParallelLayout(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    convert_checkpoint(source, save, wanted(layout, GrowthConfig(hidden="balanced", noise=0.1)), options(workers))
    assert verify(save / "iter_0000000", parent=source).faults == []
    return read_all(save / "iter_0000000")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = shape(SMALL, vocab_size=32, make_vocab_size_divisible_by=4)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "small", small, random_state(small))


def test_any_number_of_workers_makes_the_same_bits(source: Path, tmp_path: Path) -> None:
    alone = grown(source, tmp_path / "1")
    for workers in (2, 3):
        together = grown(source, tmp_path / str(workers), workers=workers)
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[key], together[key]) for key in alone)
        for file in (tmp_path / "1" / "iter_0000000").glob("*.distcp"):
            assert (tmp_path / str(workers) / "iter_0000000" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_any_layout_of_the_target_holds_the_same_bits(source: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    plain = grown(source, tmp_path / "plain")
    cut = grown(source, tmp_path / "cut", tensor=tensor, pipeline=pipeline)
    assert all(torch.equal(plain[key], cut[key]) for key in plain)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_any_expert_layout_holds_the_same_bits(source: Path, tmp_path: Path, experts: int) -> None:
    mixture = shape(BIG, vocab_size=32, make_vocab_size_divisible_by=4, num_moe_experts=4)
    found = {}
    for place, ranks in (("plain", 1), ("cut", experts)):
        layout = ParallelLayout(expert_model_parallel_size=ranks, data_parallel_size=ranks)
        large = TargetSpec("large", mixture, layout, GrowthConfig(), "fp32", 7)
        convert_checkpoint(source, tmp_path / place, large, options(1 if ranks == 1 else 2))
        assert verify(tmp_path / place / "iter_0000000", parent=source).faults == []
        found[place] = read_all(tmp_path / place / "iter_0000000")
    assert all(torch.equal(found["plain"][key], found["cut"][key]) for key in found["plain"])


def test_a_failing_worker_leaves_nothing_and_its_error_is_reported(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "iter_0000010"
    broken.parent.mkdir()
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    size = (broken / "__0_0.distcp").stat().st_size
    (broken / "__0_0.distcp").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="__0_0.distcp"):
        convert_checkpoint(
            broken, tmp_path / "save", wanted(ParallelLayout(), GrowthConfig()), options(2, contents=False)
        )
    assert not list((tmp_path / "save").glob("*iter_*"))
