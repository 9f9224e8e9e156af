"""Legacy checkpoints without Megatron: exports read back in both dialects, and optimizers map to parameters."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.formats.legacy.read import open_legacy
from megagrow.checkpoint.index.box import whole_box
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.index.index import OpenCheckpoint
from megagrow.checkpoint.tensors.table import tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from megagrow.convert.targets.legacy import Implementation, LegacyTarget
from megagrow.errors import CheckpointError
from tools.reference.memory import MemoryStore
from tools.reference.tiny_checkpoint import SMALL, random_state, shape

FOUR = SMALL | {"num_layers": 4}
LLAMA = shape(FOUR)
GPT = shape(
    FOUR, normalization="LayerNorm", position_embedding_type="learned_absolute", swiglu=False, add_bias_linear=True,
    untie_embeddings_and_output_weights=False, qk_layernorm=True,
)  # fmt: skip
QWEN = shape(FOUR, add_qkv_bias=True, untie_embeddings_and_output_weights=False)
MIXTURE = shape(FOUR, num_moe_experts=4, moe_ffn_hidden_size=6, moe_shared_expert_intermediate_size=8)
SHAPES = {"llama": LLAMA, "gpt": GPT, "qwen": QWEN, "mixture": MIXTURE}
LAYOUTS = {
    "TP1": ParallelLayout(),
    "TP2": ParallelLayout(tensor_model_parallel_size=2),
    "PP4": ParallelLayout(pipeline_model_parallel_size=4),
    "TP2 PP2 VPP2": ParallelLayout(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
        sequence_parallel=True,
    ),
    "EP2": ParallelLayout(expert_model_parallel_size=2, data_parallel_size=2),
    "TP2 PP2 EP4": ParallelLayout(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=4,
        data_parallel_size=4, sequence_parallel=True,
    ),
}  # fmt: skip


def export(
    path: Path, of: ModelShape, layout: ParallelLayout, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """Write an export of random weights; return the weights."""
    state = random_state(of, optimizer=False)
    made = LegacyTarget(MemoryStore(state), of, layout, DType.of(dtype), {"iteration": 7}, **options)
    for unit, (file,) in enumerate(made.units):
        data = b"".join(bytes(piece) for _, piece in made.produce(unit))
        assert len(data) == file.size
        (path / file.name).parent.mkdir(parents=True)
        (path / file.name).write_bytes(data)
    made.finish(path)
    return state


def check_equal(opened: OpenCheckpoint, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Assert that a checkpoint holds exactly these tensors."""
    assert set(opened.source.tensors) == set(state)
    for key, values in state.items():
        found = opened.source.read(key, whole_box(values.shape))
        assert found.dtype == dtype and torch.equal(found, values.to(dtype)), key


def edit(path: Path, change: Callable[[dict[str, Any]], Any], rank: str = "mp_rank_00") -> None:
    """Load a rank's file with torch, change its state and save it."""
    file = path / rank / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


@pytest.mark.parametrize("name,cut", itertools.product(SHAPES, LAYOUTS))
def test_an_export_reads_back_bit_for_bit(tmp_path: Path, name: str, cut: str) -> None:
    of, layout = SHAPES[name], LAYOUTS[cut]
    if layout.expert_model_parallel_size > 1 and of.num_moe_experts is None:
        with pytest.raises(CheckpointError, match="does not divide num_moe_experts 1"):
            export(tmp_path, of, layout)
        return
    state = export(tmp_path, of, layout, piece_bytes=64)
    opened = open_legacy(tmp_path)
    check_equal(opened, state)
    assert opened.layout == layout and opened.common["iteration"] == 7
    explicit = {"num_query_groups": of.groups, "kv_channels": of.head_dim, "max_position_embeddings": of.positions}
    assert opened.shape == of.model_copy(update=explicit)


@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_export_loads_safely_and_has_megatrons_names(
    tmp_path: Path, name: str, implementation: Implementation
) -> None:
    export(tmp_path, SHAPES[name], LAYOUTS["TP2"], torch.bfloat16, implementation=implementation)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(tmp_path / "mp_rank_01" / "model_optim_rng.pt", weights_only=True)
    assert state["checkpoint_version"] == 3.0 and state["args"].tensor_model_parallel_size == 2
    assert {tensor.dtype for tensor in state["model"].values() if tensor is not None} == {torch.bfloat16}
    layer = {key.removeprefix("decoder.layers.3.") for key in state["model"] if key.startswith("decoder.layers.3.")}
    fused = implementation == "transformer_engine"
    assert ("self_attention.linear_qkv.layer_norm_weight" in layer) == fused
    assert ("input_layernorm.weight" in layer) == (not fused)
    second = "pre_mlp_layernorm.weight" if name == "mixture" or not fused else "mlp.linear_fc1.layer_norm_weight"
    assert second in layer and "self_attention.linear_proj._extra_state" in layer
    assert ("mlp.experts.local_experts.3.linear_fc2.weight" in layer) == (name == "mixture")


def test_values_are_cast_and_read_in_small_pieces(tmp_path: Path) -> None:
    class Watched(MemoryStore):
        largest = 0

        def read(self, key: str, box: Any) -> Tensor:
            values = super().read(key, box)
            self.largest = max(self.largest, values.numel() * 4)
            return values

    state = random_state(LLAMA, optimizer=False)
    source = Watched(state)
    made = LegacyTarget(source, LLAMA, LAYOUTS["TP2"], DType.BFLOAT16, {"iteration": 7}, piece_bytes=100)
    first = [b"".join(bytes(piece) for _, piece in made.produce(unit)) for unit in (0, 1)]
    assert 40 < source.largest <= 100
    assert first == [b"".join(bytes(piece) for _, piece in made.produce(unit)) for unit in (0, 1)]
    export(tmp_path, LLAMA, LAYOUTS["TP2"], torch.bfloat16)
    assert first[1] == (tmp_path / "mp_rank_01" / "model_optim_rng.pt").read_bytes()
    check_equal(open_legacy(tmp_path), state, torch.bfloat16)


def test_an_export_that_lacks_a_file_or_a_tensor_is_not_finished(tmp_path: Path) -> None:
    state = export(tmp_path, LLAMA, LAYOUTS["TP2"])
    made = LegacyTarget(MemoryStore(state), LLAMA, LAYOUTS["TP2"], DType.FLOAT32, {"iteration": 7})
    file = tmp_path / "mp_rank_01" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"mp_rank_01.*: \d+ bytes, {made.units[1][0].size} were planned"):
        made.finish(tmp_path)
    del state["decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"decoder\.final_layernorm\.weight is missing"):
        LegacyTarget(MemoryStore(state), LLAMA, LAYOUTS["TP2"], DType.FLOAT32, {})


# The older dialect


def to_old(state: dict[str, Any]) -> None:
    """Rename the same weights as Megatron-LM of 2022 saved them: other names, in nested dicts."""
    names = {
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    }
    model: dict[str, Any] = {"language_model": {}}
    language = model["language_model"]
    for key, value in state["model"].items():
        if value is None:
            continue
        for new, old in names.items():
            key = key.replace(new, old)
        if key.startswith("embedding."):
            _, part, name = key.split(".")
            language.setdefault("embedding", {}).setdefault(part, {})[name] = value
        elif key.startswith("decoder."):
            language.setdefault("encoder", {})[key.removeprefix("decoder.")] = value
        elif state["args"].untie_embeddings_and_output_weights:
            language.setdefault("output_layer", {})["weight"] = value
        else:
            model["word_embeddings_for_head"] = {"weight": value}
    state["model"] = model
    state["args"].layernorm_epsilon = state["args"].norm_epsilon
    if not state["args"].swiglu:  # in 2022 a GPT's arguments did not have these
        for name in ("normalization", "position_embedding_type", "norm_epsilon", "use_rotary_position_embeddings"):
            delattr(state["args"], name)


@pytest.mark.parametrize("name,cut", itertools.product(("llama", "gpt"), ("TP1", "TP2", "PP4")))
def test_the_older_dialect_reads_the_same(tmp_path: Path, name: str, cut: str) -> None:
    of = SHAPES[name].model_copy(update={"qk_layernorm": False})
    state = export(tmp_path, of, LAYOUTS[cut], implementation="local")
    for directory in sorted(tmp_path.glob("mp_rank_*")):
        edit(tmp_path, to_old, directory.name)
    opened = open_legacy(tmp_path)
    check_equal(opened, state)
    assert "older Megatron-LM" in opened.format and opened.shape is not None
    assert (opened.shape.normalization, opened.shape.position_embedding_type) == (
        of.normalization, of.position_embedding_type,
    )  # fmt: skip
    assert bool(opened.notes) == (of.tied and cut == "PP4")


# Optimizers


def parameters(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state["model"].items():
        if value is not None:
            yield key, value


def add_optimizer(state: dict[str, Any], *, half: bool = False) -> dict[str, Tensor]:
    """Give a rank's state the optimizer of an unsharded fp32 or bf16 run; return every value by name and state."""
    decay = [(name, value) for name, value in parameters(state) if value.dim() > 1]
    rest = [(name, value) for name, value in parameters(state) if value.dim() == 1]
    values: dict[str, Tensor] = {}
    states: dict[int, Any] = {}
    groups: list[Any] = []
    masters: list[Any] = []
    number = 0
    for members, multiplier in ((rest, 0.0), (decay, 1.0)):  # older versions order them by appearance
        group: dict[str, Any] = {"wd_mult": multiplier, "lr": 1e-3, "betas": (0.9, 0.95), "step": 5, "params": []}
        masters.append([])
        for name, weight in members:
            for kind in ("exp_avg", "exp_avg_sq"):
                values[f"{kind} {name}"] = torch.randn(weight.shape)
            states[number] = {kind: values[f"{kind} {name}"] for kind in ("exp_avg", "exp_avg_sq")}
            masters[-1].append(weight.float() + 1e-3)
            values[f"param {name}"] = masters[-1][-1] if half else weight
            group["params"].append(number)
            number += 1
        groups.append(group)
    inner = {"state": states, "param_groups": groups}
    state["optimizer"] = {"optimizer": inner, "fp32_from_fp16_params": masters} if half else inner
    return values


@pytest.mark.parametrize("half", [False, True])
def test_a_plain_optimizer_is_mapped_by_its_groups(tmp_path: Path, half: bool) -> None:
    export(tmp_path, GPT, LAYOUTS["TP1"], torch.bfloat16 if half else torch.float32, implementation="local")
    kept: dict[str, Tensor] = {}
    edit(tmp_path, lambda state: kept.update(add_optimizer(state, half=half)))
    opened = open_legacy(tmp_path)
    assert len(opened.source.tensors) == 4 * len(tensor_kinds(GPT))
    for state in ("param", "exp_avg", "exp_avg_sq"):
        key = f"optimizer.state.{state}.decoder.layers.mlp.linear_fc2.weight"
        for layer in range(4):
            box = ((layer, layer + 1), (0, 8), (0, 12))
            wanted = kept[f"{state} decoder.layers.{layer}.mlp.linear_fc2.weight"]
            assert torch.equal(opened.source.read(key, box)[0], wanted)
    (group, *_) = opened.common["optimizer"]["optimizer"]["param_groups"]
    assert group["step"] == 5 and group["betas"] == (0.9, 0.95)


def swap_two(optimizer: dict[str, Any]) -> None:
    ids = optimizer["param_groups"][1]["params"]
    ids[0], ids[2] = ids[2], ids[0]


UNKNOWN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another order": (swap_two, r"exp_avg number \d+ is \[.*\], expected is embedding\.word_embeddings\.weight \["),
    "groups alike": (
        lambda o: o["param_groups"][0].update(wd_mult=1.0),
        "several parameter groups with the same weight decay",
    ),
    "one less": (lambda o: o["param_groups"][1]["params"].pop(), r"has 17 parameters with weight decay .* 18 in its"),
    "no step yet": (lambda o: o["state"].clear(), "has taken no step"),
    "steps differ": (lambda o: o["param_groups"][0].update(step=4), r"has taken \[4, 5\] steps"),
    "another kind": (lambda o: o.pop("state"), "an optimizer of an unknown kind"),
    "two": (lambda o: o, "has 2 optimizers, but its arguments imply 1"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_optimizer_that_cannot_be_mapped_is_refused(tmp_path: Path, case: str) -> None:
    change, message = UNKNOWN[case]
    export(tmp_path, GPT, LAYOUTS["TP1"], implementation="local")

    def damage(state: dict[str, Any]) -> None:
        add_optimizer(state)
        change(state["optimizer"])
        if case == "two":
            state["optimizer"] = [state["optimizer"], state["optimizer"]]

    edit(tmp_path, damage)
    with pytest.raises(CheckpointError, match=rf"{message}.*--no-optimizer leaves it out"):
        open_legacy(tmp_path)
    assert len(open_legacy(tmp_path, optimizer=False).source.tensors) == len(tensor_kinds(GPT))


def packed(length: int, **more: Any) -> dict[Any, Any]:
    """Return the content of distrib_optim.pt, with buffers of this length."""
    content = {key: torch.randn(length) for key in ("param", "exp_avg", "exp_avg_sq")}
    return {"buckets_coalesced": True, 0: {(torch.float32, torch.float32): content | {"numel_unpadded": length}}} | more


@pytest.mark.parametrize(
    "content,message",
    [
        (packed(1000), "has a buffer of 1000 values, which the model's parameters fill in no known way"),
        (packed(1000, buckets_coalesced=False), "written by Megatron before February 2024"),
        ({**packed(1000), 1: {}}, "does not have the 1 buffers that its model implies"),
        ([packed(1000), None], "contains 2 optimizers, but mp_rank_00/model_optim_rng.pt has 1"),
        ([None], "lacks an optimizer that its rank should have"),
    ],
)
def test_a_distributed_optimizer_of_another_layout_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    export(tmp_path, LLAMA, LAYOUTS["TP1"])
    edit(tmp_path, lambda state: state.update(optimizer={"optimizer": {"param_groups": [{"step": 5}]}}))
    torch.save(content, tmp_path / "mp_rank_00" / "distrib_optim.pt")
    with pytest.raises(CheckpointError, match=rf"distrib_optim\.pt: {message}"):
        open_legacy(tmp_path)
