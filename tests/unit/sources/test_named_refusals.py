"""Checkpoints of Megatron that are not read are refused by name, and fp8 scaling state is not lost in silence."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megagrow.checkpoint.formats.megatron_common import arguments_of
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.index import DType
from megagrow.checkpoint.tensors import extra_state_keys
from megagrow.config import ParallelLayout
from tests.distributed.ranks.families import verb
from tests.unit.torch_dist.test_dcp import module_state
from tools.reference.tiny_checkpoint import SMALL, random_state, shape
from tools.reference.torch_dist_writer import Writer

OF = shape(SMALL)
KEYS = extra_state_keys(OF)


# issue 12: B9
@pytest.mark.parametrize("by", ["args", "groups"])
@pytest.mark.parametrize("word", ["inspect", "convert"])
def test_a_checkpoint_of_megatron_fsdp_is_refused_by_name(by: str, word: str, tmp_path: Path) -> None:
    model = {f"module.{name}": values for name, values in module_state(OF, local=False).items()}
    args = Namespace(**{**arguments_of(OF, ParallelLayout(), DType.FLOAT32), "params_dtype": torch.float32})
    state: dict[str, Any] = {"model": model, "args": args, "iteration": 3}
    if by == "args":
        args.ckpt_format = "fsdp_dtensor"
    else:
        groups = {name: {"wd_mult": 1.0} for name in model}
        state["optimizer"] = {"state": {}, "param_to_group_meta": groups}
    dcp.save(state, checkpoint_id=tmp_path / "source", no_dist=True)
    said = verb(word, tmp_path / "source", *([tmp_path / "made"] if word == "convert" else []))
    assert said.code == 2 and "a checkpoint of Megatron-FSDP (--ckpt-format fsdp_dtensor)" in said.text


# issue 12: B9
@pytest.mark.parametrize("inside", ["", "0", "session/0"])
@pytest.mark.parametrize("dirty", ["", ".dirty"])
def test_a_local_checkpoint_is_refused_by_name(inside: str, dirty: str, tmp_path: Path) -> None:
    folder = tmp_path / "local" / inside
    folder.mkdir(parents=True)
    torch.save({}, folder / f"iter_0000100_0_local{dirty}.pt")
    for arguments in (["inspect", tmp_path / "local"], ["convert", tmp_path / "local", tmp_path / "made"]):
        said = verb(*arguments)
        assert said.code == 2 and "a local (non-persistent) checkpoint of Megatron-LM" in said.text
        assert f"iter_0000100_0_local{dirty}.pt" in said.text and "--ckpt-format torch_dist" in said.text


def with_states(path: Path, states: dict[str, Any], **more: Any) -> Path:
    """A checkpoint of Megatron-LM with `_extra_state` objects, and `more` arguments."""
    path.mkdir()
    writer = Writer(path)
    for key, values in random_state(OF, optimizer=False).items():
        writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    for key in KEYS:
        writer.put_object(key, [states.get(key)])
    args = arguments_of(OF, ParallelLayout(), DType.BFLOAT16)
    writer.finish({"iteration": 10, "args": Namespace(**{**args, "params_dtype": "bf16", **more})})
    return path


# issue 12: B9
def test_fp8_scaling_state_is_carried_by_a_reshard_and_named(tmp_path: Path) -> None:
    state = torch.arange(3000, dtype=torch.int64).to(torch.uint8)
    source = with_states(tmp_path / "source", {KEYS[0]: state, KEYS[3]: state + 1})
    said = verb("convert", source, tmp_path / "made", "parallel.pipeline_model_parallel_size=2")
    assert said.code == 0 and f"it has fp8 scaling state (2 _extra_state are not empty, first {KEYS[0]})" in said.text
    reader = TorchDistReader(tmp_path / "made" / "iter_0000010")
    assert set(reader.objects) == set(KEYS)
    for key in KEYS:
        (found,) = reader.read_object(key)
        if key in (KEYS[0], KEYS[3]):
            assert torch.equal(found, state + (key == KEYS[3]))
        else:
            assert found is None
    said = verb("convert", source, tmp_path / "grown", "model.num_layers=4")
    assert said.code == 0 and "all others leave it out" in said.text
    reader = TorchDistReader(tmp_path / "grown" / "iter_0000000")
    assert all(reader.read_object(key) == [None] for key in reader.objects)


def test_empty_states_are_not_mentioned(tmp_path: Path) -> None:
    source = with_states(tmp_path / "source", {key: torch.empty(0, dtype=torch.uint8) for key in KEYS[:4]})
    said = verb("convert", source, tmp_path / "made")
    assert said.code == 0 and "fp8" not in said.text
