"""NaN and infinite values are named and refused wherever they pass through a conversion, unless they are allowed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.index import DType, raw_of
from megagrow.checkpoint.tensors import optimizer_key
from megagrow.convert.targets import FiniteCheck, TorchDistTarget
from megagrow.errors import CheckpointError
from tests.reference.command_line import CommandLine, megagrow
from tests.reference.conversions import convert
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

__all__ = ["megagrow"]

KEY = "decoder.layers.mlp.linear_fc1.weight"
WHERE = ((1, 2), (3, 4), (2, 3))
BAD = {"nan": math.nan, "negative nan": -math.nan, "inf": math.inf, "negative inf": -math.inf}
WIDER = ["model.hidden_size=12", "model.ffn_hidden_size=20", "model.num_attention_heads=4"]


def source_with(save: Path, key: str, value: float, *, optimizer: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A sealed checkpoint with one such value in the second layer; masters and weights agree."""
    state = random_state(shape(SMALL), optimizer=optimizer, dtype=dtype)
    state[key][1, 3, 2] = value
    if key == optimizer_key("param", KEY):
        state[KEY][1, 3, 2] = value
    return write_checkpoint(save, shape(SMALL), state)


# issue 12: A4
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_weights_are_refused_by_name_in_copies_without_torch(
    tmp_path: Path, megagrow: CommandLine, name: str, dtype: torch.dtype
) -> None:
    source = source_with(tmp_path / "source", KEY, BAD[name], optimizer=False, dtype=dtype)
    for to in ("torch_dist", "huggingface", "legacy"):
        error = megagrow.refused("convert", source, tmp_path / to, "--to", to)
        wanted = "model.layers.1.mlp.gate_proj.weight" if to == "huggingface" else KEY
        where = "[3, 2]" if to == "huggingface" else "[1, 3, 2]"
        assert f"{source}: {wanted}: at least 1 values are NaN or infinite" in error and f"first at {where}" in error
        assert "--allow-non-finite" in error
        assert not (tmp_path / "huggingface").exists() and not list((tmp_path / to).glob("iter_*"))


# issue 12: A4
@pytest.mark.parametrize("state", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("arguments", [["parallel.tensor_model_parallel_size=2"], WIDER], ids=["copied", "grown"])
def test_bad_masters_and_moments_are_refused_by_name(
    tmp_path: Path, megagrow: CommandLine, state: str, arguments: list[str]
) -> None:
    key = optimizer_key(state, KEY)
    source = source_with(tmp_path / "source", key, math.nan, optimizer=True)
    error = megagrow.refused("convert", source, tmp_path / "target", *arguments)
    assert f"{source}: {KEY if state == 'param' else key}: at least" in error
    assert not list((tmp_path / "target").glob("iter_*"))


# issue 12: A4
def test_a_flag_carries_them_over_bit_for_bit_and_the_result_counts_them(tmp_path: Path, megagrow: CommandLine) -> None:
    source = source_with(tmp_path / "source", optimizer_key("param", KEY), math.nan, optimizer=True)
    code, printed, noted = megagrow("convert", source, tmp_path / "all", "--allow-non-finite", "--json")
    done = json.loads(printed)
    assert code == 0 and done["non_finite"] == {KEY: 1, optimizer_key("param", KEY): 1}
    assert f"{KEY}: 1 values are NaN or infinite, and are carried over" in noted
    assert json.loads((Path(done["target"]) / "conversion.json").read_text())["non_finite"] == done["non_finite"]
    before, after = (TorchDistReader(path).raw(KEY, WHERE) for path in (source, Path(done["target"])))
    assert before == after
    for to, name in (("huggingface", "model.layers.1.mlp.gate_proj.weight"), ("legacy", KEY)):
        code, printed, noted = megagrow("convert", source, tmp_path / to, "--to", to, "--allow-non-finite", "--json")
        assert code == 0 and json.loads(printed)["non_finite"] == {name: 1}
        assert f"{name}: 1 values are NaN or infinite" in noted
        opened = open_checkpoint(tmp_path / to, shape=shape(SMALL))
        assert opened.source.raw(KEY, WHERE) == before


# issue 12: A4
def test_what_a_type_cannot_hold_is_refused(tmp_path: Path, megagrow: CommandLine) -> None:
    source = source_with(tmp_path / "source", KEY, 70_000.0, optimizer=False)
    code, _, error = megagrow("convert", source, tmp_path / "target", "precision=fp16")
    assert code == 2 and not list((tmp_path / "target").glob("iter_*"))
    assert f"{KEY}: at least 1 values are NaN or infinite as float16 (at most 65504), first at [1, 3, 2]" in error
    megagrow.done("convert", source, tmp_path / "target", "precision=bf16")


# issue 12: A4
@pytest.mark.parametrize("value", [3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -0.0])
def test_the_largest_and_smallest_numbers_are_no_false_alarm(
    tmp_path: Path, megagrow: CommandLine, value: float
) -> None:
    source = source_with(tmp_path / "source", KEY, value, optimizer=False)
    done = json.loads(megagrow.done("convert", source, tmp_path / "target", "--json"))
    assert done["non_finite"] == {}
    assert "0 faults" in megagrow.done("verify", done["target"])


# issue 12: A4
def test_values_that_an_earlier_run_allowed_are_not_published_by_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_with(tmp_path / "source", optimizer_key("exp_avg", KEY), math.inf, optimizer=True)

    def stopped(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(TorchDistTarget, "finish", stopped)
        convert(source, tmp_path / "large", allow_non_finite=True)
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.exp_avg.*allow-non-finite again, or --restart"):
        convert(source, tmp_path / "large")
    assert not list((tmp_path / "large").glob("iter_*"))
    convert(source, tmp_path / "large", allow_non_finite=True)
    assert list((tmp_path / "large").glob("iter_*"))


@pytest.mark.parametrize("dtype", [DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_the_bit_patterns_agree_with_torch(dtype: DType) -> None:
    """Every pattern of 16 bits; for wider types the same patterns in the highest 16 of their bits, and near them."""
    high = np.arange(1 << 16, dtype=np.uint64) << (8 * dtype.itemsize - 16)
    shift = 8 * dtype.itemsize - 16
    lows = [0] if not shift else [0, 1, (1 << shift) - 1]
    patterns = np.concatenate([high | np.uint64(low) for low in lows])
    unsigned = patterns.astype(f"u{dtype.itemsize}")
    raw = unsigned.view(f"i{dtype.itemsize}")
    finite = torch.from_numpy(raw.copy()).view(dtype.torch).isfinite()
    check = FiniteCheck(allowed=True)
    check.look("all", (0,), raw, dtype)
    assert check.taken() == {"all": int((~finite).sum())}
    check.look("finite", (0,), raw[finite.numpy()], dtype)
    assert check.taken() == {}
    for index in np.flatnonzero(~finite.numpy())[::97]:
        with pytest.raises(CheckpointError, match=r"here: w: at least 1 values .* first at \[7\]"):
            FiniteCheck("here").look("w", (5,), raw[[0, 1, index]], dtype)


def test_values_of_any_shape_and_no_values_at_all_are_looked_at() -> None:
    check = FiniteCheck()
    check.look("w", (0, 0), raw_of(torch.zeros(0, 3)), DType.FLOAT32)
    values = torch.zeros(3, 400_000)
    values[2, 399_999] = math.nan
    with pytest.raises(CheckpointError, match=r"first at \[2, 399999\]"):
        check.look("w", (0, 0), raw_of(values), DType.FLOAT32)
    check.look("ids", (0,), np.full(4, -1, np.int32), DType.INT32)
