"""Flat buckets with Transformer Engine's and grouped experts' parameters, and everything that must be refused.

Saves by Megatron-Core itself are read in tests/distributed/checkpoint/test_layouts_read.py. What cannot run on CPU
is written here by hand, from an order of parameters that is spelled out a second time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.formats.torch_dist.flat_optimizer import FlatOptimizerReader, read_flat_optimizer
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.tensors.table import optimizer_key
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError
from tools.reference.tiny_checkpoint import SMALL, random_state, shape
from tools.reference.torch_dist_writer import Writer

ATTENTION, MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
FC1, FC2 = (f"{MLP}experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))
MIXTURE = SMALL | {"num_moe_experts": 3, "moe_ffn_hidden_size": 20, "moe_shared_expert_intermediate_size": 12}
GROUP, BUFFER = (
    "optimizer.distributed.dp_group_idx_0.",
    "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.",
)
State = dict[str, Tensor]
Part = tuple[str, Callable[[Tensor], Tensor]]


def dense_of_engine(layer: int) -> Iterator[Part]:
    """Yield a dense layer of Transformer Engine, where a norm belongs to the linear layer that follows it."""
    for key in ("linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"):
        yield ATTENTION + key, lambda whole: whole[layer]
    for key in ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight"):
        yield MLP + key, lambda whole: whole[layer]


def mixture_of_engine(layer: int, *, transposed: bool) -> Iterator[Part]:
    """Yield a layer of experts, in Transformer Engine's grouped layers or in the old GroupedMLP."""
    for key in ("linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"):
        yield ATTENTION + key, lambda whole: whole[layer]
    for key in ("decoder.layers.pre_mlp_layernorm.weight", f"{MLP}router.weight"):
        yield key, lambda whole: whole[layer]
    for key in (FC1, FC2):
        if transposed:
            yield key, lambda whole: whole[layer].transpose(-1, -2)
            continue
        for expert in range(3):
            yield key, lambda whole, expert=expert: whole[layer, expert]  # type: ignore[misc]  # a default argument of a lambda
    for key in ("shared_experts.linear_fc1.weight", "shared_experts.linear_fc2.weight"):
        yield MLP + key, lambda whole: whole[layer]


def parts(layers: Callable[[int], Iterator[Part]], of: ModelShape) -> list[Part]:
    """Return all parameters of one rank."""
    before, behind = ["embedding.word_embeddings.weight"], ["decoder.final_layernorm.weight", "output_layer.weight"]
    inside = [part for layer in range(of.num_layers) for part in layers(layer)]
    return [*((key, torch.clone) for key in before), *inside, *((key, torch.clone) for key in behind)]


def write(path: Path, state: State, order: list[Part], **objects: Any) -> Path:
    """Write a checkpoint whose optimizer is one bucket, cut over two data-parallel ranks."""
    path.mkdir()
    writer = Writer(path)
    for key, values in state.items():
        if not key.startswith("optimizer."):
            writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    size = 0
    for name in ("param", "exp_avg", "exp_avg_sq"):
        flat = torch.empty(0)
        for key, part in reversed(order):
            flat = torch.cat([flat, torch.zeros(-len(flat) % 64), part(state[optimizer_key(name, key)]).flatten()])
        size, half = len(flat), len(flat) // 2 - 5
        for start, piece in ((0, flat[:half]), (half, flat[half:])):
            writer.put(GROUP + BUFFER + name, (size,), (start,), piece)
    recorded: dict[str, Any] = {"per_bucket_numel_unpadded": [{(torch.bfloat16, torch.float32): [size]}]}
    recorded["optimizer"] = {"param_groups": [{"lr": 1e-3, "step": 7}]}
    for name, value in (recorded | objects).items():
        writer.put_object(f"{GROUP}{name}/shard_0_1", [value])
    writer.finish({"iteration": 7, "optimizer": {"param_state_sharding_type": "dp_reshardable"}})
    return path


ORDERS = {
    "dense": (SMALL, dense_of_engine),
    "grouped": (MIXTURE, lambda layer: mixture_of_engine(layer, transposed=False)),
    "transposed": (MIXTURE, lambda layer: mixture_of_engine(layer, transposed=True)),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("layout", [ParallelLayout(), None], ids=["known", "unknown"])
def test_orders_that_need_a_gpu_are_read(name: str, layout: ParallelLayout | None, tmp_path: Path) -> None:
    sizes, layers = ORDERS[name]
    of = shape(sizes)
    state = random_state(of, dtype=torch.bfloat16)
    reader = read_flat_optimizer(TorchDistReader(write(tmp_path / "source", state, parts(layers, of))), of, layout)
    check_read(reader, state)


def check_read(reader: TorchDistReader | FlatOptimizerReader, state: State) -> None:
    """Assert that all of a state is read, whole and by slice, as if it had been saved fully reshardable."""
    assert set(reader.tensors) == set(state) and not reader.objects
    for key, values in state.items():
        assert torch.equal(reader.read_whole(key), values), key
        box = tuple((size // 3, size) for size in values.shape)
        assert torch.equal(reader.read(key, box), values[tuple(slice(a, b) for a, b in box)]), key
    group = {"param_groups": [{"lr": 1e-3, "step": 7}]}
    assert reader.common()["optimizer"] == {"optimizer": group, "param_state_sharding_type": "fully_reshardable"}


@pytest.fixture
def of() -> ModelShape:
    return shape(SMALL)


@pytest.fixture
def state(of: ModelShape) -> State:
    return random_state(of, dtype=torch.bfloat16)


def refused(path: Path, of: ModelShape, layout: ParallelLayout | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        read_flat_optimizer(TorchDistReader(path), of, layout)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: its dp_reshardable optimizer: ")
    assert str(error.value).endswith("; --no-optimizer leaves it out")
    return str(error.value)


def test_another_order_is_refused_by_its_values(of: ModelShape, state: State, tmp_path: Path) -> None:
    order = parts(dense_of_engine, of)
    order[1], order[2] = order[2], order[1]
    order[3], order[5] = order[5], order[3]
    error = refused(write(tmp_path / "source", state, order), of)
    assert "buckets do not hold this model's parameters" in error or "masters differ from the model's weights" in error


def test_masters_of_another_model_are_refused(of: ModelShape, state: State, tmp_path: Path) -> None:
    key = ATTENTION + "linear_proj.weight"
    state[key] = state[key].clone()
    state[key][1, 0, 0] += 1
    error = refused(write(tmp_path / "source", state, parts(dense_of_engine, of)), of)
    assert (
        f"its masters differ from the model's weights in every known order of parameters, first in {key} [1:2" in error
    )


def test_a_missing_or_extra_parameter_is_refused(of: ModelShape, state: State, tmp_path: Path) -> None:
    order = parts(dense_of_engine, of)
    assert "parameters fill buckets of" in refused(write(tmp_path / "few", state, order[:-1]), of)
    assert "parameters fill buckets of" in refused(write(tmp_path / "many", state, [*order, order[-1]]), of)


def test_another_layout_or_shape_is_named(of: ModelShape, state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "source", state, parts(dense_of_engine, of))
    tensor = ParallelLayout(tensor_model_parallel_size=2)
    assert "written by 1 model-parallel ranks with 1 model chunks, not by TP2" in refused(path, of, tensor)
    larger = shape(SMALL | {"ffn_hidden_size": 16})
    with pytest.raises(
        CheckpointError, match=r"linear_fc1\.weight has shape \(2, 24, 8\), the model's is \(2, 32, 8\)$"
    ):
        read_flat_optimizer(TorchDistReader(path), larger, None)


def test_recorded_bucket_sizes_must_be_those_of_the_buckets(of: ModelShape, state: State, tmp_path: Path) -> None:
    wrong = [{(torch.bfloat16, torch.float32): [64]}]
    path = write(tmp_path / "source", state, parts(dense_of_engine, of), per_bucket_numel_unpadded=wrong)
    assert "per_bucket_numel_unpadded/shard_0_1 records [[64]] values, but the buckets hold [[" in refused(path, of)
    path = write(tmp_path / "no sizes", state, parts(dense_of_engine, of), per_bucket_numel_unpadded=[7])
    assert "per_bucket_numel_unpadded/shard_0_1: damaged: no bucket sizes: " in refused(path, of)


def test_any_other_checkpoint_is_left_as_it_is(of: ModelShape, state: State, tmp_path: Path) -> None:
    tmp_path.joinpath("full").mkdir()
    writer = Writer(tmp_path / "full")
    for key, values in state.items():
        writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    writer.finish({})
    reader = TorchDistReader(tmp_path / "full")
    assert read_flat_optimizer(reader, of, None) is reader
