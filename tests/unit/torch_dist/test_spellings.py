"""A checkpoint reads the same however Megatron-Core spelled its keys: per layer, per expert or per half."""

import itertools
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.directory import integrity
from megagrow.checkpoint.formats.megatron_common.unsharded_state import canonical_common
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.formats.torch_dist.spellings import ParsedKey, parse_key
from megagrow.checkpoint.proof.verify import verify
from megagrow.checkpoint.tensors.table import tensor_kinds
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.errors import CheckpointError
from tests.unit.convert.test_convert import read_all
from tools.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint
from tools.reference.torch_dist_writer import Writer


def unstacked(stacked: Path, save: Path, *, drop: str = "") -> Path:
    """Write the same checkpoint with `decoder.layers.{i}.x` keys, each tensor in two chunks."""
    path = save / stacked.name
    path.mkdir(parents=True)
    reader, writer = TorchDistReader(stacked), Writer(path)
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
    integrity.seal(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "stacked", shape(SMALL), random_state(shape(SMALL)))


def test_it_reads_verifies_and_grows_like_the_stacked_one(source: Path, tmp_path: Path) -> None:
    other = unstacked(source, tmp_path / "numbered")
    assert set(TorchDistReader(other).tensors) == set(TorchDistReader(source).tensors)
    assert verify(other).faults == []
    one, two = read_all(source), read_all(other)
    assert all(torch.equal(one[key], two[key]) for key in one)
    target = TargetSpec("large", shape(LARGE), ParallelLayout(), GrowthConfig(), "fp32", 7)
    grown = []
    for place, path in (("a", source), ("b", other)):
        convert_checkpoint(path, tmp_path / place, target)
        grown.append(read_all(tmp_path / place / "iter_0000000"))
    assert all(torch.equal(grown[0][key], grown[1][key]) for key in grown[0])


def test_a_missing_layer_is_named(source: Path, tmp_path: Path) -> None:
    key = next(kind.key for kind in tensor_kinds(shape(SMALL)) if kind.per_layer)
    lost = key.replace("layers.", "layers.0.")
    other = unstacked(source, tmp_path / "numbered", drop=lost)
    target = TargetSpec("large", shape(LARGE), ParallelLayout(), GrowthConfig(), "fp32", 7)
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        convert_checkpoint(other, tmp_path / "save", target)


FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))
MIXTURE = SMALL | {"num_moe_experts": 3, "moe_ffn_hidden_size": 20, "moe_shared_expert_intermediate_size": 12}


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("output_layer.weight", ParsedKey("output_layer.weight")),
        ("decoder.layers.11.mlp.linear_fc2.bias", ParsedKey("decoder.layers.mlp.linear_fc2.bias", 11)),
        ("decoder.layers.0.mlp.linear_fc1.weight_w", ParsedKey("decoder.layers.mlp.linear_fc1.weight", 0, None, 0)),
        ("decoder.layers.3.mlp.linear_fc1.bias_v", ParsedKey("decoder.layers.mlp.linear_fc1.bias", 3, None, 1)),
        ("decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_v", ParsedKey(FC1, 3, 7, 1)),
        ("decoder.layers.3.mlp.experts.experts.7.linear_fc2.weight", ParsedKey(FC2, 3, 7)),
        ("decoder.layers.3.mlp.experts.linear_fc2.weight12", ParsedKey(FC2, 3, 12)),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", ParsedKey(FC2)),
        (f"chained_1.optimizer.state.exp_avg.{FC2}", ParsedKey(f"optimizer.state.exp_avg.{FC2}")),
        ("optimizer.state.fp32_param.output_layer.weight", ParsedKey("optimizer.state.param.output_layer.weight")),
        ("chained_0.optimizer.distributed.x", ParsedKey("chained_0.optimizer.distributed.x")),
        ("mtp.layers.0.enorm.weight", ParsedKey("mtp.layers.0.enorm.weight")),
    ],
)
def test_keys_are_parsed(key: str, wanted: ParsedKey) -> None:
    assert parse_key(key) == wanted


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint of these tensors, each in two chunks."""
    path.mkdir()
    writer = Writer(path)
    for key, values in tensors.items():
        half = values.shape[0] // 2
        for start, part in ((0, values[:half]), (half, values[half:])):
            if part.numel():
                writer.put(key, tuple(values.shape), (start, *[0] * (values.dim() - 1)), part)
    writer.finish({})
    return path


def split_keys(key: str, values: Tensor) -> dict[str, Tensor]:
    """Split a canonical tensor as `singleton_local_shards` does: a key per layer, expert and half of a gated MLP."""
    if "decoder.layers." not in key:
        return {key: values}
    result: dict[str, Tensor] = {}
    of_experts = "experts.experts." in key
    for place in itertools.product(*(range(size) for size in values.shape[: 1 + of_experts])):
        name = key.replace("layers.", f"layers.{place[0]}.")
        name = name.replace("experts.experts.", f"experts.experts.{place[-1]}.") if of_experts else name
        one = values[place]
        gated = "linear_fc1.weight" in key
        result |= dict(zip((f"{name}_w", f"{name}_v"), one.chunk(2), strict=True)) if gated else {name: one}
    return result


def assert_read(path: Path, wanted: Mapping[str, Tensor]) -> None:
    reader = TorchDistReader(path)
    assert set(reader.tensors) == set(wanted)
    for key, values in wanted.items():
        assert torch.equal(reader.read_whole(key), values), key
        box = tuple((size // 3, size) for size in values.shape)
        assert torch.equal(reader.read(key, box), values[tuple(slice(a, b) for a, b in box)]), key


@pytest.mark.parametrize("sizes", [SMALL, MIXTURE], ids=["dense", "mixture"])
def test_layers_experts_and_halves_are_assembled(sizes: dict[str, int], tmp_path: Path) -> None:
    state = random_state(shape(sizes))
    parts = {name: part for key, values in state.items() for name, part in split_keys(key, values).items()}
    assert any(name.endswith("_v") for name in parts)
    assert_read(write(tmp_path / "apart", parts), state)


@pytest.mark.parametrize("lost", ["_w", ".1.linear_fc1", "layers.0.", "other shape"])
def test_incomplete_tensors_keep_their_own_keys(lost: str, tmp_path: Path) -> None:
    parts = split_keys(FC1, torch.randn(2, 3, 8, 4))
    kept = {key: values for key, values in parts.items() if lost not in key}
    if lost == "other shape":
        kept["decoder.layers.0.mlp.experts.experts.0.linear_fc1.weight_w"] = torch.randn(5, 4)
    assert_read(write(tmp_path / "apart", kept), kept)


def test_the_norm_before_experts_has_one_name(tmp_path: Path) -> None:
    norm = torch.randn(2, 8)
    tensors = {"decoder.layers.mlp.linear_fc1.layer_norm_weight": norm}
    assert_read(write(tmp_path / "dense", tensors), tensors)
    experts = {FC2: torch.randn(2, 3, 4, 4)}
    path = write(tmp_path / "mixture", tensors | experts)
    assert_read(path, {"decoder.layers.pre_mlp_layernorm.weight": norm} | experts)


def test_masters_are_found_without_the_distributed_optimizer(tmp_path: Path) -> None:
    values = {
        "output_layer.weight": torch.randn(6, 4),
        "optimizer.state.exp_avg.output_layer.weight": torch.randn(6, 4),
    }
    master = {"optimizer.state.param.output_layer.weight": values["output_layer.weight"]}
    assert_read(write(tmp_path / "fp32", values), values | master)
    values["output_layer.weight"] = values["output_layer.weight"].bfloat16()
    assert_read(write(tmp_path / "bf16 without masters", values), values)


def flattened(path: Path, tensors: Mapping[str, Tensor], states: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> Path:
    """Write a checkpoint as Megatron-Core 0.14 does: states flattened, each cut into a grid and over two ranks."""
    flat, known = dict(tensors), {}
    for key, (values, grid) in states.items():
        local = [size // count for size, count in zip(values.shape, grid, strict=True)]
        split = values.reshape([n for pair in zip(grid, local, strict=True) for n in pair])
        split = split.permute(*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2))
        flat[key] = split.reshape(*grid, -1)
        known[key] = {"nd_reformulated_orig_global_shape": tuple(values.shape)}
    path.mkdir()
    writer = Writer(path)
    for key, values in flat.items():
        places = itertools.product(*(range(n) for n in values.shape[:-1])) if key in known else [()]
        for place in places:
            one = values[place]
            cut = one.shape[0] // 3
            for start, part in ((0, one[:cut]), (cut, one[cut:])) if cut else ((0, one),):
                whole = part[(None,) * len(place)]
                writer.put(key, tuple(values.shape), (*place, start, *[0] * (one.dim() - 1)), whole)
    writer.finish({})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.mcore_data = known
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def test_states_flattened_over_data_parallel_ranks_are_read(tmp_path: Path) -> None:
    weight, proj = torch.randn(2, 12, 5), torch.randn(2, 5, 6)
    fc1, fc2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
    gain = "decoder.final_layernorm.weight"
    tensors = {fc1: weight, fc2: proj, gain: torch.randn(5)}
    states = {
        f"optimizer.state.exp_avg.{fc1}": (torch.randn(2, 12, 5), (2, 4, 1)),
        f"chained_0.optimizer.state.fp32_param.{fc2}": (torch.randn(2, 5, 6), (2, 1, 2)),
        f"optimizer.state.exp_avg_sq.{gain}": (torch.randn(5), (1,)),
    }
    path = flattened(tmp_path / "flat", tensors, states)
    found = {parse_key(key).key: values for key, (values, _) in states.items()}
    assert_read(path, tensors | {f"optimizer.state.param.{fc1}": weight} | found)


@pytest.mark.parametrize(
    ("hidden", "ffn", "gated"), [(4, 6, 2), (4, 4, 2), (4, 2, 2), (4, 6, 1)], ids=["any", "fc2", "fc1", "plain"]
)
@pytest.mark.parametrize("transposed", [True, False])
def test_states_of_the_old_grouped_experts_are_transposed(
    hidden: int, ffn: int, gated: int, transposed: bool, tmp_path: Path
) -> None:
    weights = {FC1: torch.randn(2, 3, gated * ffn, hidden), FC2: torch.randn(2, 3, hidden, ffn)}
    states = {f"optimizer.state.exp_avg.{key}": torch.randn(values.shape) for key, values in weights.items()}
    written = {key: values.transpose(-1, -2) if transposed else values for key, values in states.items()}
    path = flattened(
        tmp_path / "flat", {key: values.bfloat16() for key, values in weights.items()},
        {key: (values, (2, 3, 1, 1)) for key, values in written.items()},
    )  # fmt: skip
    assert_read(path, {key: values.bfloat16() for key, values in weights.items()} | states)


def test_square_experts_are_not_guessed(tmp_path: Path) -> None:
    weights = {FC1: torch.randn(2, 3, 4, 4).bfloat16(), FC2: torch.randn(2, 3, 4, 4).bfloat16()}
    states = {f"optimizer.state.exp_avg.{key}": (torch.randn(2, 3, 4, 4), (2, 3, 1, 1)) for key in weights}
    found = set(TorchDistReader(flattened(tmp_path / "flat", weights, states)).tensors)
    assert found == {*weights, *(f"{key} (square: transposed or not)" for key in states)}


def test_common_state_of_newer_versions_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.mkdir()
    writer = Writer(path)
    writer.put("w", (2,), (0,), torch.ones(2))
    writer.put_object("common_state/shard_0_1", [{"iteration": 7, "args": {"num_layers": 2}}])
    writer.finish({})
    (path / "common.pt").unlink()
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    assert TorchDistReader(path).common() == {"iteration": 7, "args": {"num_layers": 2}}


GROUPS: dict[str, Any] = {"param_groups": [{"lr": 0.1, "step": 3}]}
PART = {"optimizer": GROUPS, "param_state_sharding_type": "fully_reshardable"}


@pytest.mark.parametrize(
    ("optimizer", "wanted"),
    [
        ({"optimizer": GROUPS, "param_state_sharding_type": "fully_sharded_model_space"}, PART),
        ({"optimizer": GROUPS}, PART),
        (GROUPS, PART),
        ({"state": {"common_step": torch.tensor(3.0)}, "param_groups": [{"lr": 0.1}]}, PART),
        ({0: {"optimizer": GROUPS, "param_state": {}}, 1: {"optimizer": GROUPS}}, {0: PART, 1: PART}),
        ({"optimizer": GROUPS, "grad_scaler": {"scale": 2.0}}, PART | {"grad_scaler": {"scale": 2.0}}),
    ],
    ids=["flattened", "bf16", "fp32", "torch's Adam", "two", "fp16"],
)
def test_the_optimizer_is_described_as_it_is_read(optimizer: Any, wanted: Any) -> None:
    content = {"singleton_local_shards": True, "distrib_optim_sharding_type": "dp_reshardable", "other": 1}
    found = canonical_common({"iteration": 3, "optimizer": optimizer, "content_metadata": content})
    assert found["optimizer"] == wanted
    full = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "other": 1}
    assert found["content_metadata"] == full and found["iteration"] == 3
