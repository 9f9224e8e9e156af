"""Directories of torch.distributed.checkpoint, written by torch itself in the nested dicts that trainers use."""

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megagrow.checkpoint.formats.megatron_common.arguments import arguments_of
from megagrow.checkpoint.formats.torch_dist.dcp import open_dcp
from megagrow.checkpoint.index.box import whole_box
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.index.index import OpenCheckpoint
from megagrow.checkpoint.tensors.table import LAYERS, optimizer_key, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from megagrow.errors import CheckpointError
from tools.reference.tiny_checkpoint import SMALL, random_state, shape

LLAMA = shape(SMALL)
MIXTURE = shape(SMALL, num_moe_experts=4, moe_ffn_hidden_size=6)


def module_state(of: ModelShape, *, local: bool, prefix: str = "") -> dict[str, Tensor]:
    """Return a GPTModel's state dict with a key per layer and expert; `local` gives norms names of their own."""
    result: dict[str, Tensor] = {}
    for key, values in random_state(of, optimizer=False).items():
        if not key.startswith(LAYERS):
            result[prefix + key] = values
            continue
        for layer, one in enumerate(values):
            name = key.removeprefix(LAYERS)
            if local:
                name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
                name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
            if "experts.experts." in name:
                for expert, each in enumerate(one):
                    own = name.replace("experts.experts.", f"experts.local_experts.{expert}.")
                    result[f"{prefix}{LAYERS}{layer}.{own}"] = each.clone()
            else:
                result[f"{prefix}{LAYERS}{layer}.{name}"] = one.clone()
    return result


def adam(model: dict[str, Tensor], step: float = 4.0) -> dict[str, Any]:
    """Return what torch's get_optimizer_state_dict returns: states by name, and groups with names."""
    state = {
        name: {"exp_avg": values + 1, "exp_avg_sq": values**2, "step": torch.tensor(step)}
        for name, values in model.items()
    }
    return {"state": state, "param_groups": [{"params": list(model), "lr": 1e-3, "betas": (0.9, 0.95)}]}


def save(path: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)


def check(opened: OpenCheckpoint, of: ModelShape, *, optimizer: bool) -> None:
    state = random_state(of, optimizer=False)
    wanted = dict(state)
    if optimizer:
        for key, values in state.items():
            wanted |= {
                optimizer_key("param", key): values,
                optimizer_key("exp_avg", key): values + 1,
                optimizer_key("exp_avg_sq", key): values**2,
            }
    assert set(opened.source.tensors) == set(wanted)
    for key, values in wanted.items():
        assert torch.equal(opened.source.read(key, whole_box(values.shape)), values), key


@pytest.mark.parametrize("of", [LLAMA, MIXTURE], ids=["llama", "mixture"])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    "nest",
    [
        lambda model: model,
        lambda model: {"model": model},
        lambda model: {"state_dict": {"model": model}},
        lambda model: {"model": {f"module.{name}": values for name, values in model.items()}},
        lambda model: {f"model.{name}": values for name, values in model.items()},
    ],
    ids=["bare", "model", "state_dict.model", "module", "prefixed"],
)
def test_weights_are_read_from_any_nesting(
    tmp_path: Path, of: ModelShape, local: bool, nest: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    save(tmp_path, nest(module_state(of, local=local)) | {"iteration": 3})
    opened = open_dcp(tmp_path)
    check(opened, of, optimizer=False)
    assert opened.shape is None and opened.layout is None and opened.common["iteration"] == 3 and not opened.notes


@pytest.mark.parametrize("name", ["optim", "optimizer"])
def test_adams_state_is_read_by_name(tmp_path: Path, name: str) -> None:
    model = module_state(MIXTURE, local=True)
    save(tmp_path, {"model": model, name: adam(model)})
    opened = open_dcp(tmp_path)
    check(opened, MIXTURE, optimizer=True)
    assert opened.common["optimizer"]["optimizer"]["param_groups"] == [{"step": 4, "lr": 1e-3, "betas": (0.9, 0.95)}]
    check(open_dcp(tmp_path, optimizer=False), MIXTURE, optimizer=False)


def test_arguments_give_the_shape_whatever_the_caller_expects(tmp_path: Path) -> None:
    args = argparse.Namespace(**arguments_of(LLAMA, ParallelLayout(data_parallel_size=2), DType.FLOAT32))
    args.params_dtype = torch.float32
    save(tmp_path, {"model": module_state(LLAMA, local=False), "args": args, "extra": torch.ones(2)})
    opened = open_dcp(tmp_path)
    assert opened.shape is not None and opened.shape.num_layers == LLAMA.num_layers
    assert opened.layout == ParallelLayout(data_parallel_size=2)
    assert opened.notes == ("1 tensors that are not the model's are left out, first extra",)
    assert open_dcp(tmp_path, shape=MIXTURE).shape == opened.shape


def numbered(model: dict[str, Tensor]) -> dict[str, Any]:
    state = dict(enumerate(adam(model)["state"].values()))
    return {"model": model, "optimizer": {"state": state}}


def uneven(model: dict[str, Tensor]) -> dict[str, Any]:
    optimizer = adam(model)
    next(iter(optimizer["state"].values()))["step"] = torch.tensor(3.0)
    return {"model": model, "optim": optimizer}


def half(model: dict[str, Tensor]) -> dict[str, Any]:
    model = {name: values.bfloat16() for name, values in model.items()}
    return {"model": model, "optim": adam(model)}


@pytest.mark.parametrize(
    "change,message",
    [
        (numbered, r"states are numbered and not named, so their parameters are unknown .*; --no-optimizer"),
        (uneven, r"its optimizer does not have one step count for all parameters; --no-optimizer"),
        (half, r"its optimizer has no fp32 masters; --no-optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_read_is_refused_but_can_be_left_out(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Any]], message: str
) -> None:
    save(tmp_path, change(module_state(LLAMA, local=False)))
    with pytest.raises(CheckpointError, match=message):
        open_dcp(tmp_path)
    assert len(open_dcp(tmp_path, optimizer=False).source.tensors) == len(tensor_kinds(LLAMA))


@pytest.mark.parametrize(
    "state,message",
    [
        (
            {"model.embed_tokens.weight": torch.ones(2, 2), "model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)},
            r"its tensors have Hugging Face names \(model\.embed_tokens\.weight\).*save_pretrained",
        ),
        ({"weights": torch.ones(2)}, "not a Megatron-Core GPT"),
        (
            {name: {"embedding": {"word_embeddings": {"weight": torch.ones(2)}}} for name in ("student", "teacher")},
            r"holds 2 models, under 'student\.', 'teacher\.'",
        ),
    ],
)
def test_a_model_that_is_not_megatrons_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    save(tmp_path, state)
    with pytest.raises(CheckpointError, match=message):
        open_dcp(tmp_path)


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


def test_hostile_arguments_are_refused_by_name(tmp_path: Path) -> None:
    args = argparse.Namespace(hook=Touch(tmp_path / "ran"))
    save(tmp_path / "c", {"model": module_state(LLAMA, local=False), "args": args})
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"args: refused: it would import posix\.system"):
        open_dcp(tmp_path / "c")
    assert not (tmp_path / "ran").exists()
