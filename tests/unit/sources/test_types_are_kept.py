"""Weights that a bf16 source holds in fp32 stay fp32, and stacks of several types are read without a loss."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.formats.legacy.read import open_legacy
from megagrow.checkpoint.formats.open import open_checkpoint, precision_of
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index.dtypes import DType, common_dtype, raw_of, widened
from megagrow.checkpoint.tensors import optimizer_key
from megagrow.config import ModelShape
from tests.unit.huggingface.test_huggingface import exported, put_tensors, tensors_of
from tools.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint
from tools.reference.torch_dist_writer import Writer

ROOT = Path(__file__).parents[3]
TP2 = "parallel.tensor_model_parallel_size=2"
WIDE = ("layer_norm_weight", "final_layernorm.weight", "output_layer.weight")
WIDER = [f"model.{name}={size}" for name, size in LARGE.items()]


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"},
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def partly_wide(of: ModelShape, *, optimizer: bool = False) -> dict[str, Tensor]:
    """The state of a bf16 model whose norms and output layer are fp32."""
    state = random_state(of, optimizer=optimizer)
    return {
        key: values if key.startswith("optimizer.") or key.endswith(WIDE) else values.bfloat16()
        for key, values in state.items()
    }


def types(reader: TorchDistReader) -> dict[str, str]:
    return {key: str(info.dtype) for key, info in reader.tensors.items() if not key.startswith("optimizer.")}


def expected_types(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: str(DType.of(values.dtype)) for key, values in state.items() if not key.startswith("optimizer.")}


# issue 12: A5
@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_fp32_tensors_of_a_bf16_model_stay_fp32(tmp_path: Path, optimizer: bool, grown: bool) -> None:
    state = partly_wide(shape(SMALL), optimizer=optimizer)
    write_checkpoint(tmp_path / "source", shape(SMALL), state)
    done = run("convert", tmp_path / "source", tmp_path / "target", TP2, *(WIDER if grown else ()))
    assert "4 of 9 tensors stay float32, as in the source: decoder.final_layernorm.weight, " in done.stderr
    assert "Megatron-Core rounds them on load where its model is bfloat16" in done.stderr
    (final,) = (tmp_path / "target").glob("iter_*")
    reader = TorchDistReader(final)
    assert types(reader) == expected_types(state)
    for key, values in () if grown else state.items():
        master = state.get(optimizer_key("param", key), values)
        assert torch.equal(reader.read_whole(key), master.to(values.dtype)), key
    run("verify", final)


# issue 12: A5
def test_the_dry_run_and_the_record_tell_it_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", shape(SMALL), partly_wide(shape(SMALL)))
    assert "4 of 9 tensors stay float32" in run("convert", tmp_path / "source", tmp_path / "t", "--dry-run").stderr
    record = json.loads(run("convert", tmp_path / "source", tmp_path / "t", "--json").stdout)
    assert "4 of 9 tensors stay float32" in record["notes"][0]
    assert run("convert", tmp_path / "source", tmp_path / "t", "--json").stdout.count("stay float32") == 1


# issue 12: A5
@pytest.mark.parametrize("to", ["huggingface", "legacy"])
def test_exports_keep_them_too(tmp_path: Path, to: str) -> None:
    state = partly_wide(shape(SMALL))
    write_checkpoint(tmp_path / "source", shape(SMALL), state)
    done = run("convert", tmp_path / "source", tmp_path / "target", "--to", to)
    assert "4 of 9 tensors stay float32" in done.stderr
    opened = open_checkpoint(tmp_path / "target")
    assert precision_of(opened.source) == "bf16"
    for key, values in state.items():
        found = opened.source.read(key, tuple((0, size) for size in values.shape))
        assert found.dtype == values.dtype and torch.equal(found, values), key
    if to == "huggingface":
        config = json.loads((tmp_path / "target/config.json").read_text())
        assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


# issue 12: A5
@pytest.mark.parametrize(
    "precision,note",
    [
        ("fp16", "4 of 9 tensors are rounded from float32 to float16: "),
        ("fp32", "weights are cast from bf16 to fp32"),
    ],
)
def test_another_precision_is_given_to_all_and_said(tmp_path: Path, precision: str, note: str) -> None:
    write_checkpoint(tmp_path / "source", shape(SMALL), partly_wide(shape(SMALL)))
    done = run("convert", tmp_path / "source", tmp_path / "target", f"precision={precision}")
    assert note in done.stderr and "stay float32" not in done.stderr
    assert set(types(TorchDistReader(tmp_path / "target/iter_0000010")).values()) == {
        {"fp16": "float16", "fp32": "float32"}[precision]
    }


# issue 12: A5
def test_rounding_of_a_whole_model_is_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", shape(SMALL), random_state(shape(SMALL), optimizer=False))
    done = run("convert", tmp_path / "source", tmp_path / "target", "precision=bf16")
    assert "all tensors are rounded from float32 to bfloat16: decoder.final_layernorm.weight, " in done.stderr
    assert run("convert", tmp_path / "source", tmp_path / "same").stderr == ""


# issue 12: A5
def test_layers_of_several_types_are_read_without_a_loss(tmp_path: Path) -> None:
    of, state = shape(SMALL), random_state(shape(SMALL), optimizer=False)
    source = tmp_path / "source"
    source.mkdir()
    writer, wanted = Writer(source), dict(state)
    for key, values in state.items():
        if "decoder.layers." not in key:
            writer.put(key, tuple(values.shape), (0,) * values.dim(), values.bfloat16())
            wanted[key] = values.bfloat16()
            continue
        parts = []
        for layer, part in enumerate(values):  # newer Megatron-Core: one key for each layer
            part = part if layer == 1 and "linear_fc2" in key else part.half() if layer else part.bfloat16()
            name = key.replace("decoder.layers.", f"decoder.layers.{layer}.")
            writer.put(name, tuple(part.shape), (0,) * part.dim(), part)
            parts.append(part.float())
        wanted[key] = torch.stack(parts)
    writer.finish({"iteration": 10, "args": None})
    sizes = of.model_dump(exclude_none=True)
    given = [*(f"source.{name}={value}" for name, value in sizes.items()), "source.rope_scaling_factor=null"]
    done = run("convert", source, tmp_path / "target", *given)
    assert "6 stacked tensors have parts of several types and are read in the widest: " in done.stderr
    reader = TorchDistReader(tmp_path / "target/iter_0000010")
    for key, values in wanted.items():
        assert torch.equal(reader.read_whole(key), values) and reader.tensors[key].dtype == DType.of(values.dtype), key
    assert " several types " in run("inspect", source).stdout


# issue 12: A5
def test_hugging_face_layers_of_several_types_are_read_without_a_loss(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    directory = exported(tmp_path / "source", "llama")
    tensors = {name: values.bfloat16() for name, values in tensors_of(directory).items()}
    wide = "model.layers.1.mlp.up_proj.weight"
    tensors[wide] = tensors_of(directory)[wide]
    put_tensors(directory, tensors)
    done = run("convert", directory, tmp_path / "back", "--to", "huggingface")
    assert "1 stacked tensors have parts of several types and are read in the widest" in done.stderr
    back = tensors_of(tmp_path / "back")
    for name, values in tensors.items():
        assert torch.equal(back[name].float(), values.float()), name
    assert back[wide].dtype == torch.float32 and back["model.norm.weight"].dtype == torch.bfloat16


# issue 12: A5
def test_legacy_ranks_of_several_types_are_read_without_a_loss(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", shape(SMALL), random_state(shape(SMALL), optimizer=False))
    run("convert", tmp_path / "source", tmp_path / "legacy", "--to", "legacy", "precision=bf16")
    file = tmp_path / "legacy/iter_0000010/mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)  # written by this test
    key = "decoder.layers.1.self_attention.linear_proj.weight"
    wide = state["model"][key] = torch.randn(state["model"][key].shape)
    torch.save(state, file)
    opened = open_legacy(file.parents[1])
    info = opened.source.tensors["decoder.layers.self_attention.linear_proj.weight"]
    found = opened.source.read("decoder.layers.self_attention.linear_proj.weight", tuple((0, n) for n in info.shape))
    assert info.dtype is DType.FLOAT32 and torch.equal(found[1], wide)
    assert torch.equal(found[0], state["model"][key.replace("1", "0")].float())


# issue 12: A5
@pytest.mark.parametrize("narrow", [DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32])
@pytest.mark.parametrize("wide", [DType.FLOAT32, DType.FLOAT64])
def test_every_value_is_widened_exactly(narrow: DType, wide: DType) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    patterns = bits.to(torch.int16) if narrow.itemsize == 2 else bits << 16
    values = patterns.view(narrow.torch)
    made = torch.from_numpy(widened(raw_of(values).copy(), narrow, wide)).view(wide.torch)
    wanted = values.to(wide.torch)
    assert torch.equal(made.nan_to_num(0.5), wanted.nan_to_num(0.5)) and torch.equal(made.isnan(), wanted.isnan())
    assert np.array_equal(torch.signbit(made[~made.isnan()]), torch.signbit(wanted[~wanted.isnan()]))


# issue 12: A5
def test_the_type_of_parts_holds_all_of_them() -> None:
    assert common_dtype({DType.BFLOAT16}) is DType.BFLOAT16
    assert common_dtype({DType.BFLOAT16, DType.FLOAT16}) is DType.FLOAT32
    assert common_dtype({DType.BFLOAT16, DType.FLOAT64}) is DType.FLOAT64
    assert common_dtype({DType.FLOAT32, DType.INT32}) is None


LOADS = """
import os, sys, torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda *a: None
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
for dtype in (torch.float32, torch.bfloat16):
    key = "decoder.final_layernorm.weight"
    asked = {key: ShardedTensor.from_rank_offsets(key, torch.zeros(8, dtype=dtype))}
    found = dist_checkpointing.load(asked, sys.argv[1])[key]
    torch.save(found, sys.argv[2] + "." + str(dtype))
"""


# issue 12: A5
def test_bare_megatron_core_loads_fp32_as_it_is_or_rounds_it(tmp_path: Path) -> None:
    state = partly_wide(shape(SMALL))
    write_checkpoint(tmp_path / "source", shape(SMALL), state)
    run("convert", tmp_path / "source", tmp_path / "target")
    command = [sys.executable, "-c", LOADS, str(tmp_path / "target/iter_0000010"), str(tmp_path / "found")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.load(tmp_path / f"found.{dtype}")
        assert found.dtype == dtype and torch.equal(found, state["decoder.final_layernorm.weight"].to(dtype))


# issue 12: A5
def test_a_bf16_model_without_wider_tensors_has_no_note(tmp_path: Path) -> None:
    final = write_checkpoint(tmp_path / "source", shape(SMALL), random_state(shape(SMALL), dtype=torch.bfloat16))
    assert run("convert", final, tmp_path / "target", TP2).stderr == ""
