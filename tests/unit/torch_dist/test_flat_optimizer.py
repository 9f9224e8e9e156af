"""Flat buckets of Transformer Engine's and of grouped experts' parameters, and everything that must be refused.

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
    """A dense layer of Transformer Engine: norms are held by the linear layers behind them."""
    for key in ("linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"):
        yield ATTENTION + key, lambda whole: whole[layer]
    for key in ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight"):
        yield MLP + key, lambda whole: whole[layer]


def mixture_of_engine(layer: int, *, transposed: bool) -> Iterator[Part]:
    """A layer of experts, in Transformer Engine's grouped layers or in the old GroupedMLP."""
    for key in ("linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"):
        yield ATTENTION + key, lambda whole: whole[layer]
    for key in ("decoder.layers.pre_mlp_layernorm.weight", f"{MLP}router.weight"):
        yield key, lambda whole: whole[layer]
    for key in (FC1, FC2):
        if transposed:
            yield key, lambda whole: whole[layer].transpose(-1, -2)
            continue
        for expert in range(3):
            yield key, lambda whole, expert=expert: whole[layer, expert]  # type: ignore[misc]
    for key in ("shared_experts.linear_fc1.weight", "shared_experts.linear_fc2.weight"):
        yield MLP + key, lambda whole: whole[layer]


def parts(layers: Callable[[int], Iterator[Part]], of: ModelShape) -> list[Part]:
    """All parameters of one rank."""
    before, behind = ["embedding.word_embeddings.weight"], ["decoder.final_layernorm.weight", "output_layer.weight"]
    inside = [part for layer in range(of.num_layers) for part in layers(layer)]
    return [*((key, torch.clone) for key in before), *inside, *((key, torch.clone) for key in behind)]


def write(path: Path, state: State, order: list[Part], **objects: Any) -> Path:
    """A checkpoint whose optimizer is one bucket, cut over two data-parallel ranks."""
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
    told: dict[str, Any] = {"per_bucket_numel_unpadded": [{(torch.bfloat16, torch.float32): [size]}]}
    told["optimizer"] = {"param_groups": [{"lr": 1e-3, "step": 7}]}
    for name, value in (told | objects).items():
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
    """All of a state is there, whole and by slice, as if it had been saved fully reshardable."""
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
    return str(error.value)


def test_another_order_is_refused_by_its_values(of: ModelShape, state: State, tmp_path: Path) -> None:
    order = parts(dense_of_engine, of)
    order[1], order[2] = order[2], order[1]
    order[3], order[5] = order[5], order[3]
    said = refused(write(tmp_path / "source", state, order), of)
    assert "buckets do not hold this model's parameters" in said or "not the model's weights" in said


def test_masters_of_another_model_are_refused(of: ModelShape, state: State, tmp_path: Path) -> None:
    key = ATTENTION + "linear_proj.weight"
    state[key] = state[key].clone()
    state[key][1, 0, 0] += 1
    said = refused(write(tmp_path / "source", state, parts(dense_of_engine, of)), of)
    assert (
        f"its masters are not the model's weights in any known order of parameters: they differ in {key} [1:2" in said
    )


def test_a_parameter_too_few_or_too_many_is_refused(of: ModelShape, state: State, tmp_path: Path) -> None:
    order = parts(dense_of_engine, of)
    assert "parameters fill buckets of" in refused(write(tmp_path / "few", state, order[:-1]), of)
    assert "parameters fill buckets of" in refused(write(tmp_path / "many", state, [*order, order[-1]]), of)


def test_another_layout_or_shape_is_named(of: ModelShape, state: State, tmp_path: Path) -> None:
    path = write(tmp_path / "source", state, parts(dense_of_engine, of))
    tensor = ParallelLayout(tensor_model_parallel_size=2)
    assert "1 model-parallel ranks with 1 model chunks wrote it, not TP2" in refused(path, of, tensor)
    larger = shape(SMALL | {"ffn_hidden_size": 16})
    assert "linear_fc1.weight has shape (2, 24, 8), the model's is (2, 32, 8)" in refused(path, larger)


def test_what_the_buckets_say_of_themselves_must_be_true(of: ModelShape, state: State, tmp_path: Path) -> None:
    wrong = [{(torch.bfloat16, torch.float32): [64]}]
    path = write(tmp_path / "source", state, parts(dense_of_engine, of), per_bucket_numel_unpadded=wrong)
    assert "per_bucket_numel_unpadded/shard_0_1 says [[64]], its buckets hold [[" in refused(path, of)
    path = write(tmp_path / "no sizes", state, parts(dense_of_engine, of), per_bucket_numel_unpadded=[7])
    assert "per_bucket_numel_unpadded/shard_0_1: damaged: no sizes of buckets: " in refused(path, of)


def test_any_other_checkpoint_is_left_as_it_is(of: ModelShape, state: State, tmp_path: Path) -> None:
    tmp_path.joinpath("full").mkdir()
    writer = Writer(tmp_path / "full")
    for key, values in state.items():
        writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    writer.finish({})
    reader = TorchDistReader(tmp_path / "full")
    assert read_flat_optimizer(reader, of, None) is reader
