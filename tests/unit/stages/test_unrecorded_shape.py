"""Without arguments, what no tensor shows is asked for by name and never assumed; a run_config.yaml answers it."""

import argparse
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from megagrow.checkpoint.directory import read_manifest
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.config import ModelShape
from tests.reference.command_line import CommandLine, megagrow
from tests.unit.stages.stage_family import large_shape, write_family, write_source
from tests.unit.torch_dist.test_dcp import module_state

__all__ = ["megagrow"]

BRIDGE = Path(__file__).parents[1] / "torch_dist" / "run_config_of_bridge.yaml"
SCALED: dict[str, Any] = {"rotary_base": 500000, "rope_scaling_factor": 8.0, "layernorm_epsilon": 1e-6}
GPT: dict[str, Any] = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
    "add_bias_linear": True, "max_position_embeddings": 8, "openai_gelu": True,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "num_moe_experts": 4, "moe_ffn_hidden_size": 20, "moe_router_topk": 3, "moe_shared_expert_intermediate_size": 8,
}  # fmt: skip
SHAPES: dict[str, ModelShape] = {
    "llama": large_shape(**SCALED),
    "tied qwen": large_shape(add_qkv_bias=True, untie_embeddings_and_output_weights=False),
    "gpt": large_shape(**GPT),
    "mixture": large_shape(**MIXTURE),
    "norms of q and k": large_shape(qk_layernorm=True),
}


def bare_torch_dist(folder: Path, of: ModelShape) -> Path:
    """A torch_dist checkpoint that records nothing of its shape."""
    path = write_source(folder, of, seal=False)
    (path / "megagrow.json").unlink()
    return path


def bare_legacy(folder: Path, of: ModelShape, megagrow: CommandLine, *layout: str) -> Path:
    """A legacy checkpoint without arguments."""
    megagrow.done("convert", write_source(folder / "own", of), folder / "legacy", *layout, "--to", "legacy")
    path = next((folder / "legacy").glob("iter_*"))
    for file in path.rglob("model_optim_rng.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, weights_only=True)
        del state["args"]
        torch.save(state, file)
    return path


def bare_dcp(folder: Path, of: ModelShape) -> Path:
    """A directory of torch.distributed.checkpoint with the model alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": module_state(of, local=False)}, checkpoint_id=folder, no_dist=True)
    return folder


def asked(error: str) -> list[str]:
    """The fields that an error asks for."""
    return [word.removeprefix("source.").removesuffix("=...") for word in error.split() if word.endswith("=...")]


def answers(of: ModelShape, error: str) -> list[str]:
    """What a user replies to an error."""
    values = {name: getattr(of, name) for name in asked(error)}
    return [f"source.{name}={'null' if value is None else str(value).lower()}" for name, value in values.items()]


def check_function(target: Path, of: ModelShape) -> None:
    """Assert that a converted checkpoint is of this shape; the multiple of the vocabulary may be another."""
    found = read_manifest(open_checkpoint(target).source.path).shape  # type: ignore[attr-defined]  # a reader of files
    free = {"make_vocab_size_divisible_by", "max_position_embeddings", "ffn_hidden_size"}
    free |= {"attention_dropout", "hidden_dropout", "moe_aux_loss_coeff", "num_query_groups", "kv_channels"}
    assert found.model_dump(exclude=free) == of.model_dump(exclude=free)
    same = ("groups", "head_dim", "positions", "mlp_width", "padded_vocab_size")
    assert [getattr(found, name) for name in same] == [getattr(of, name) for name in same]


# issue 12: A2
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("form", ["torch_dist", "legacy", "DCP"])
def test_what_no_tensor_shows_is_asked_for_in_one_error(
    tmp_path: Path, megagrow: CommandLine, form: str, name: str
) -> None:
    of, target = SHAPES[name], tmp_path / "target"
    if form == "torch_dist":
        source = bare_torch_dist(tmp_path / "source", of)
    else:
        source = bare_dcp(tmp_path / "source", of) if form == "DCP" else bare_legacy(tmp_path, of, megagrow)
    error = megagrow.refused("convert", source, target)
    wanted = {"layernorm_epsilon"}
    wanted |= {"rotary_base", "rotary_percent", "rope_scaling_factor", "seq_length"} if name != "gpt" else set()
    wanted |= {"openai_gelu"} if name == "gpt" else {"swiglu"}
    wanted |= {"moe_router_topk"} if name == "mixture" else set()
    wanted |= {"num_attention_heads"} if name != "norms of q and k" else set()
    assert set(asked(error)) == wanted and not target.exists()
    replies = answers(of, error)
    for reply in replies:  # each of them is needed
        rest = [other for other in replies if other != reply]
        assert asked(megagrow.refused("convert", source, target, *rest)) == [reply[7:].partition("=")[0]]
    megagrow.done("convert", source, target, *replies)
    check_function(target, of)


# issue 12: A2
def test_a_stage_asks_for_it_as_well(tmp_path: Path, megagrow: CommandLine) -> None:
    source = bare_torch_dist(tmp_path / "source", large_shape())
    family = write_family(tmp_path, large_shape())
    error = megagrow.refused("convert", family, "--stage", "grown", "--source", source)
    assert "source.rotary_base=... (theta, such as 10000 or 500000)" in error
    assert f"with: megagrow convert {source} TARGET source.NAME=VALUE" in error


# issue 12: A2
@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_a_legacy_checkpoint_of_several_ranks(tmp_path: Path, megagrow: CommandLine, layout: str) -> None:
    of = large_shape(num_layers=4, **SCALED)
    source = bare_legacy(tmp_path, of, megagrow, f"parallel.{layout}=2")
    error = megagrow.refused("convert", source, tmp_path / "target")
    # the output layer of a pipeline's last rank is a weight of its own, or a copy of the embedding
    assert ("untie_embeddings_and_output_weights" in asked(error)) == layout.startswith("pipeline")
    megagrow.done("convert", source, tmp_path / "target", *answers(of, error))
    check_function(tmp_path / "target", of)


# issue 12: A2
def test_an_answer_that_the_tensors_contradict_is_refused(tmp_path: Path, megagrow: CommandLine) -> None:
    of = large_shape()
    source = bare_torch_dist(tmp_path / "source", of)
    replies = answers(of, megagrow.refused("convert", source, tmp_path / "t"))
    for wrong, message in (
        ("source.num_attention_heads=3", "3 query heads"),
        ("source.num_attention_heads=5", "does not divide the 16 columns of linear_proj"),
        ("source.hidden_size=16", "shape"),
        ("source.rotary_base=much", "rotary_base"),
        ("source.rotary_bas=1", "did you mean rotary_base?"),
    ):
        error = megagrow.refused("convert", source, tmp_path / "t", *replies, wrong)
        assert message in error or "does not divide" in error, error
        assert not (tmp_path / "t").exists()


def run_config(of: ModelShape, **others: Any) -> dict[str, Any]:
    """What Megatron-Bridge would have written for a shape."""
    content: dict[str, Any] = yaml.safe_load(BRIDGE.read_text())
    silu = {"_target_": "torch.nn.functional.silu", "_call_": False}
    gelu = {"_target_": "megatron.core.activations.fast_gelu" if of.openai_gelu else "torch._C._nn.gelu"}
    same = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "seq_length", "normalization", "layernorm_epsilon", "position_embedding_type", "rotary_base", "rotary_percent",
        "add_bias_linear", "add_qkv_bias", "qk_layernorm", "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk",
        "moe_shared_expert_intermediate_size", "make_vocab_size_divisible_by", "vocab_size",
    )  # fmt: skip
    content["model"] |= {name: getattr(of, name) for name in same}
    content["model"] |= {
        "gated_linear_unit": of.swiglu,
        "activation_func": silu if of.swiglu else gelu,
        "share_embeddings_and_output_weights": of.tied,
        "rope_scaling": of.rope_scaling_factor is not None,
        "rope_scaling_factor": of.rope_scaling_factor or 1.0,
        "should_pad_vocab": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_aux_loss_coeff": of.moe_aux_loss_coeff,
    }
    content["model"] |= others
    return content


# issue 12: A2
@pytest.mark.parametrize("name", SHAPES)
def test_a_run_config_answers_everything(tmp_path: Path, megagrow: CommandLine, name: str) -> None:
    of = SHAPES[name]
    forms = {
        "torch_dist": bare_torch_dist(tmp_path / "source", of),
        "legacy": bare_legacy(tmp_path, of, megagrow),
        "dcp": bare_dcp(tmp_path / "dcp", of),
    }
    for form, source in forms.items():
        beside = source if form == "torch_dist" else source.parent
        (beside / "run_config.yaml").write_text(yaml.safe_dump(run_config(of)))
        megagrow.done("convert", source, tmp_path / f"from {form}")
        check_function(tmp_path / f"from {form}", of)
        assert f"num_layers={of.num_layers}" in megagrow.done("inspect", source)


# issue 12: A2
def test_a_run_config_is_compared_with_the_stage(tmp_path: Path, megagrow: CommandLine) -> None:
    source = bare_torch_dist(tmp_path / "source", large_shape())
    builder = run_config(large_shape(), **SCALED | {"rope_scaling": True})
    outer = ("vocab_size", "should_pad_vocab", "seq_length", "share_embeddings_and_output_weights", "rotary_base")
    nested = {name: value for name, value in builder["model"].items() if name not in outer}
    # the form of newer versions: the model's fields around those of the transformer, and a short activation_func
    builder["model"] = {name: builder["model"][name] for name in outer} | {
        "_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
        "_builder_": "megatron.bridge.models.gpt.gpt_builder.GPTModelBuilder",
        "transformer": nested | {"activation_func": "silu", "_target_": "x.TransformerConfig"},
    }
    (source / "run_config.yaml").write_text(yaml.safe_dump(builder))
    error = megagrow.refused("convert", write_family(tmp_path, large_shape()), "--stage", "grown", "--source", source)
    for change in ("rotary_base changes from 500000", "rope_scaling_factor changes from 8.0", "from 1e-06 to 1e-05"):
        assert change in error
    megagrow.done("convert", write_family(tmp_path, large_shape(**SCALED)), "--stage", "grown", "--source", source)


# issue 12: A2
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_base": None, "layernorm_epsilon": None}, "missing model.layernorm_epsilon, model.rotary_base"),
        ({"activation_func": "megatron.core.activations.squared_relu"}, "activation_func is squared_relu with a gate"),
        ({"_target_": "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"}, "is Gemma2ModelProvider"),
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"layernorm_zero_centered_gamma": True}, "norm gains stored minus one"),
        ({"seq_len_interpolation_factor": 4.0}, "interpolated rotary positions"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type"),
        ({"scale_factor": 8.0, "low_freq_factor": 2}, "low_freq_factor is 2"),
        ({"vocab_size": "many"}, "damaged"),
    ],
)
def test_a_run_config_that_is_not_understood_is_refused(
    tmp_path: Path, megagrow: CommandLine, change: dict[str, Any], message: str
) -> None:
    source = bare_torch_dist(tmp_path / "source", large_shape())
    (source / "run_config.yaml").write_text(yaml.safe_dump(run_config(large_shape(), **change)))
    assert message in megagrow.refused("convert", source, tmp_path / "target")


# issue 12: A2
@pytest.mark.parametrize("text", ["", "- 1", "model: 3", "model: [", "a: &a [*a]", "[" * 10_000, "\x00", "{<<: {}}"])
def test_a_damaged_run_config_is_one_line(tmp_path: Path, megagrow: CommandLine, text: str) -> None:
    source = bare_torch_dist(tmp_path / "source", large_shape())
    (source / "run_config.yaml").write_text(text)
    assert "run_config.yaml" in megagrow.refused("convert", source, tmp_path / "target")


# issue 12: A2
def test_arguments_win_over_a_run_config_and_over_the_command(tmp_path: Path, megagrow: CommandLine) -> None:
    megagrow.done("convert", write_source(tmp_path / "own", large_shape()), tmp_path / "legacy", "--to", "legacy")
    source = next((tmp_path / "legacy").glob("iter_*"))
    (source / "run_config.yaml").write_text(yaml.safe_dump(run_config(large_shape(**SCALED))))
    error = megagrow.refused("convert", source, tmp_path / "out", "source.rotary_base=500000")
    assert "rotary_base is 10000 in the checkpoint and 500000 in the command" in error
    megagrow.done("convert", source, tmp_path / "out")
    check_function(tmp_path / "out", large_shape())
    shutil.rmtree(tmp_path / "out")
