"""Weights are made from the optimizer's masters, so a source in which these differ is refused, and the way out works.

Megatron-Core 0.16.1 itself saves masters shifted (`megagrow/checkpoint/live/bucket_repair.py`), and whoever edits the
weights of a checkpoint leaves its masters as they were.
"""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.directory import integrity
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.tensors import optimizer_key
from tests.distributed.ranks.families import verb
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

FC2 = "decoder.layers.mlp.linear_fc2.weight"
EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
MIXTURE = shape(SMALL, num_moe_experts=4, moe_ffn_hidden_size=12)
HALVES = [torch.bfloat16, torch.float16, torch.float32]


# issue 12: B9
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_shifted_masters_are_refused_and_left_out_on_request(dtype: torch.dtype, tmp_path: Path) -> None:
    of, state = shape(SMALL), random_state(shape(SMALL), dtype=dtype)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        values = state[optimizer_key(name, FC2)].clone()
        values[1] = torch.roll(values[1], 1, dims=-1)
        state[optimizer_key(name, FC2)] = values
    source = write_checkpoint(tmp_path / "source", of, state)
    said = verb("convert", source, tmp_path / "made")
    assert said.code == 2 and f"{FC2}[1:2, 0:1, 0:12]: the weights are not the optimizer's masters" in said.text
    assert not (tmp_path / "made").exists()
    assert verb("convert", source, tmp_path / "made", "--no-optimizer").code == 0
    reader = TorchDistReader(tmp_path / "made" / "iter_0000010")
    assert torch.equal(reader.read_whole(FC2), state[FC2]) and optimizer_key("param", FC2) not in reader.tensors


# issue 12: B9
def test_edited_weights_of_the_last_expert_are_not_lost(tmp_path: Path) -> None:
    state = random_state(MIXTURE)
    state[EXPERTS] = state[EXPERTS].clone()  # in fp32 weights and masters are one tensor
    state[EXPERTS][1, 3, 0, 0] += 1
    source = write_checkpoint(tmp_path / "source", MIXTURE, state)
    said = verb("convert", source, tmp_path / "made")
    assert said.code == 2 and f"{EXPERTS}[1:2, 3:4, 0:1, 0:12]" in said.text
    assert verb("convert", source, tmp_path / "made", "--no-optimizer", "model.num_layers=4").code == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_rounded_either_way_are_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(shape(SMALL), dtype=dtype)
    for key in [key for key in state if not key.startswith("optimizer.")]:
        master = state[optimizer_key("param", key)]
        wider = master.to(dtype).float()
        state[key] = torch.where(
            wider < master, torch.nextafter(master.to(dtype), torch.tensor(9e9, dtype=dtype)), wider
        )
        state[key] = state[key].to(dtype)
    source = write_checkpoint(tmp_path / "source", shape(SMALL), state)
    assert verb("convert", source, tmp_path / "made").code == 0


# issue 12: B9
@pytest.mark.parametrize(
    ("states", "message"),
    [
        (("param", "exp_avg", "exp_avg_sq", "momentum_buffer"), "its optimizer is Muon or SGD, which keeps momentum_"),
        (("param", "momentum_buffer"), "its optimizer is Muon or SGD, which keeps momentum_buffer"),
        (("param", "exp_avg", "exp_avg_sq", "hessian"), "its optimizer is an optimizer other than Adam, which keeps h"),
    ],
)
def test_states_of_another_optimizer_are_refused_by_name(states: tuple[str, ...], message: str, tmp_path: Path) -> None:
    state = random_state(shape(SMALL), optimizer=False)
    for key, weight in list(state.items()):
        for name in states:  # Muon keeps momenta of matrices, and Adam's states of all else
            is_matrix = weight.dim() > 2
            if name == "param" or is_matrix == (name in ("momentum_buffer", "hessian")):
                state[optimizer_key(name, key)] = weight.float()
    source = write_checkpoint(tmp_path / "source", shape(SMALL), state)
    said = verb("convert", source, tmp_path / "made")
    assert said.code == 2 and message in said.text and "--no-optimizer leaves it out" in said.text
    assert verb("convert", source, tmp_path / "made", "--no-optimizer").code == 0
    assert verb("inspect", source).code == 0


def test_weights_that_were_rounded_to_8_bits_are_accepted_where_the_arguments_say_so(tmp_path: Path) -> None:
    of, state = shape(SMALL), random_state(shape(SMALL))
    for key in [key for key in state if not key.startswith("optimizer.")]:
        state[key] = state[optimizer_key("param", key)].to(torch.float8_e4m3fn).to(torch.bfloat16)
    source = write_checkpoint(tmp_path / "source", of, state)
    assert verb("convert", source, tmp_path / "made").code == 2
    common = torch.load(source / "common.pt", weights_only=False)
    torch.save({**common, "args": Namespace(fp8_param_gather=True)}, source / "common.pt")
    integrity.seal(source)
    assert verb("convert", source, tmp_path / "made").code == 0
