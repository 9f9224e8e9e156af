"""Every argument that Megatron-LM saves is harmless, carried or refused; those of forks are named or refused."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.formats.megatron_common import argument_notes, classify_argument, shape_of_arguments
from megagrow.checkpoint.formats.megatron_common.argument_check import CARRIED, REFUSED
from megagrow.checkpoint.formats.megatron_common.known_arguments import HARMLESS
from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.checkpoint.pickles import zip_writer
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from tools.checkpoint.megatron_arguments import arguments_of_checkout
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "tests/unit/checkpoint/megatron_arguments"
VERSIONS = ("core_v0.16.1", "main_2026-08-22")
GPT = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
    "openai_gelu": True, "add_bias_linear": True, "untie_embeddings_and_output_weights": False,
    "max_position_embeddings": 8, "attention_dropout": 0.1, "hidden_dropout": 0.1,
}  # fmt: skip


def defaults(version: str) -> dict[str, Any]:
    """The arguments of a run of Megatron-LM that sets nothing but sizes, as they are after its validation."""
    recorded: dict[str, Any] = json.loads((RECORDED / f"{version}.json").read_text())
    sizes = SMALL | {
        "group_query_attention": True, "kv_channels": 4, "seq_length": 8, "max_position_embeddings": 8,
        "encoder_num_layers": 2, "padded_vocab_size": 30, "make_vocab_size_divisible_by": 2, "vocab_size": 30,
        "data_parallel_size": 1, "rank": 0, "world_size": 1, "params_dtype": torch.float32,
    }  # fmt: skip
    return recorded | sizes


def of_megatron_lm(save: Path, args: dict[str, Any], of: ModelShape) -> Path:
    """A checkpoint as written by Megatron-LM: weights, and the arguments of its run."""
    final = write_checkpoint(save, of, random_state(of, optimizer=False))
    for name in ("megagrow.json", "integrity.json"):
        (final / name).unlink()
    common = {"iteration": 10, "checkpoint_version": 3.0, "args": argparse.Namespace(**args)}
    (final / "common.pt").write_bytes(zip_writer.save_small(common))
    return save


def llama(**more: Any) -> dict[str, Any]:
    """Arguments of a Llama."""
    return {
        **defaults("core_v0.16.1"), "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True,
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True, **more,
    }  # fmt: skip


def mixture(**more: Any) -> dict[str, Any]:
    """Arguments of a Llama with experts."""
    return llama(num_experts=4, **{"moe_ffn_hidden_size": 6, **more})


def run(*arguments: object, code: int = 0, module: str = "megagrow") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"},
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


# issue 12: A3
@pytest.mark.parametrize("version", VERSIONS)
def test_every_argument_of_megatron_lm_is_classified(version: str) -> None:
    names = json.loads((RECORDED / f"{version}.json").read_text())
    assert len(names) > 700 and [name for name in names if classify_argument(name) is None] == []


# issue 12: A3
def test_no_argument_has_two_classes() -> None:
    groups = [*HARMLESS.values(), CARRIED, frozenset(REFUSED)]
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


# issue 12: A3
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_with_default_arguments_is_converted_without_a_word(version: str, tmp_path: Path) -> None:
    source = of_megatron_lm(tmp_path / "source", defaults(version), shape(SMALL, **GPT))
    done = run("convert", source, tmp_path / "target")
    assert done.stderr == ""
    opened = open_checkpoint(tmp_path / "target")
    assert opened.shape == shape(SMALL, **GPT)
    again = shape_of_arguments(opened.common["args"])
    assert again == opened.shape and argument_notes(opened.common["args"]) == ()


# issue 12: A3
@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_with_experts_and_default_arguments_is_read_without_a_note(version: str) -> None:
    args = mixture() | {name: value for name, value in defaults(version).items() if name not in mixture()}
    args |= {name: value for name, value in defaults(version).items() if name.startswith("moe_router")}
    assert shape_of_arguments(args).num_moe_experts == 4 and argument_notes(args) == ()


# issue 12: A3
@pytest.mark.parametrize(
    "name,value",
    [
        ("softmax_scale", 0.1), ("moe_expert_capacity_factor", 1.25), ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", ["aux_loss", "quantile_balancing"]), ("use_mup", True),
        ("mup_embedding_mult", 10.0), ("mup_output_mult", 0.5), ("mup_base_hidden_size", 4),
        ("layernorm_zero_centered_gamma", True), ("rope_type", "yarn"), ("moe_router_group_topk", 2),
        ("moe_input_jitter_eps", 0.01), ("moe_router_force_load_balancing", True), ("gated_linear_unit", True),
        ("is_hybrid_model", True), ("enable_mhc_connections", True), ("moe_mlp_glu_interleave_size", 32),
        ("spec", ["fork.layers", "layer_spec"]), ("export_quant_cfg", "fp8"), ("window_size", (4, 0)),
    ],
)  # fmt: skip
def test_arguments_that_change_the_function_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    args = mixture(**{"swiglu": name != "gated_linear_unit", name: value})
    of = shape(SMALL, num_moe_experts=4, moe_ffn_hidden_size=6)
    source = of_megatron_lm(tmp_path / "source", args, of)
    with pytest.raises(CheckpointError, match=rf"^{source}/iter_0000010: args: not a model .* \({name}="):
        open_checkpoint(source)


# issue 12: A3
def test_the_command_line_refuses_with_one_line_that_names_argument_and_value(tmp_path: Path) -> None:
    source = of_megatron_lm(tmp_path / "source", llama(softmax_scale=0.1), shape(SMALL))
    done = run("convert", source, tmp_path / "target", code=2)
    assert "another scale of attention than 1 / sqrt(head_dim) (softmax_scale=0.1)" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "target").exists()


# issue 12: A3
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_argument_is_refused_with_a_value_that_no_version_has(name: str) -> None:
    args = mixture()
    if name == "gated_linear_unit":
        args["swiglu"] = False
    with pytest.raises(CheckpointError, match=name):
        shape_of_arguments(args | {name: 17})


# issue 12: A3
@pytest.mark.parametrize(
    "name,value",
    [
        ("softmax_scale", 0.5), ("moe_expert_capacity_factor", -1.0), ("window_size", (-1, 0)), ("spec", ["local"]),
        ("moe_router_load_balancing_type", ["seq_aux_loss", "global_aux_loss"]), ("no_rope_freq", [0, 0]),
        ("gated_linear_unit", True), ("rotary_seq_len_interpolation_factor", 1), ("mup_output_mult", 1.0),
    ],
)  # fmt: skip
def test_values_that_leave_a_feature_off_pass(name: str, value: Any) -> None:
    assert shape_of_arguments(mixture(**{name: value})).num_moe_experts == 4  # its heads have 4 channels


# issue 12: A3
def test_settings_of_experts_do_not_matter_in_a_dense_model() -> None:
    assert shape_of_arguments(llama(moe_expert_capacity_factor=1.0)).num_moe_experts is None


# issue 12: A3
def test_an_unknown_argument_is_named_in_one_note(tmp_path: Path) -> None:
    args = llama(my_blend="web", my_steps=3, my_switch=False, my_list=[], my_zero=0)
    source = of_megatron_lm(tmp_path / "source", args, shape(SMALL))
    done = run("convert", source, tmp_path / "target", "parallel.tensor_model_parallel_size=2")
    wanted = "2 arguments are not Megatron-LM's and taken to be harmless: my_blend=web, my_steps=3"
    assert done.stderr.count("my_blend") == 1 and wanted in done.stderr
    assert wanted in json.loads((tmp_path / "target/iter_0000010/conversion.json").read_text())["notes"]
    assert wanted in run("convert", source, tmp_path / "other", "--dry-run").stderr
    assert wanted in run("convert", source, tmp_path / "hf", "--to", "huggingface").stderr


# issue 12: A3
def test_growth_into_a_stage_shows_the_note_too(tmp_path: Path) -> None:
    source = of_megatron_lm(tmp_path / "source", llama(my_blend="web"), shape(SMALL))
    rest = {"kv_channels": 4, "make_vocab_size_divisible_by": 2, "seq_length": 8, "vocab_size": 30}
    model = [f"stages.0.model.{name}={value}" for name, value in SMALL.items()]
    model += [f"defaults.model.{name}={value}" for name, value in rest.items()]
    place = ("--stage", "small", "--source", source / "iter_0000010", "--save", tmp_path / "target")
    save = f"save={tmp_path / 'runs'}"  # not the demo's own, which may be finished
    done = run("convert", ROOT / "examples/demo/family.yaml", save, *model, *place)
    assert "1 argument is not Megatron-LM's and taken to be harmless: my_blend=web" in done.stderr


# issue 12: A3
@pytest.mark.parametrize(
    "name",
    [
        "embedding_multiplier", "logits_scaling", "attn_logit_softcapping", "final_logit_softcapping", "logit_cap",
        "qk_norm", "use_subln_layernorm", "router_bias", "mlp_gate", "routing_method", "residual_scale",
        "query_pre_attn_scalar", "scale_emb", "rope_theta", "mupDepth", "attention_bias", "use_rms_norm",
    ],
)  # fmt: skip
def test_an_unknown_argument_whose_name_speaks_of_the_function_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}=2: not Megatron-LM's, .* add --ignore-argument {name}$"):
        shape_of_arguments(llama(**{name: 2}))
    shape_of_arguments(llama(**{name: 0}))
    shape_of_arguments(llama(**{name: 2}), ignored={name})


# issue 12: A3
@pytest.mark.parametrize(
    "name", ["normal_steps", "aggregate", "capture_dir", "scalability", "escape", "gateway", "recap"]
)
def test_a_word_that_only_contains_such_a_word_is_not_refused(name: str) -> None:
    assert shape_of_arguments(llama(**{name: 2}))
    assert name in argument_notes(llama(**{name: 2}))[0]


# issue 12: A3
def test_the_user_may_say_that_an_unknown_argument_is_harmless(tmp_path: Path) -> None:
    source = of_megatron_lm(tmp_path / "source", llama(grad_norm_window=8), shape(SMALL))
    refused = run("convert", source, tmp_path / "target", code=2)
    assert "grad_norm_window=8" in refused.stderr and "--ignore-argument grad_norm_window" in refused.stderr
    for workers in (1, 2):
        done = run(
            "convert", source, tmp_path / f"target{workers}", "--ignore-argument", "grad_norm_window",
            "--workers", workers,
        )  # fmt: skip
        assert "1 argument is not Megatron-LM's and taken to be harmless: grad_norm_window=8" in done.stderr
    assert "grad_norm_window" in run("inspect", source, "--ignore-argument", "grad_norm_window").stdout
    run("diff", source, source, "--ignore-argument", "grad_norm_window")
    known = of_megatron_lm(tmp_path / "known", llama(softmax_scale=8.0), shape(SMALL))
    run("convert", known, tmp_path / "wrong", "--ignore-argument", "softmax_scale", code=2)


# issue 12: A3
def test_names_and_values_do_not_reach_a_terminal_raw_or_at_length() -> None:
    (note,) = argument_notes(llama(**{"a\x1b[31m": "b\nc\x1b", "long": "x" * 500}))
    assert note.isprintable() and len(note) < 200
    (note,) = argument_notes(llama(**{f"my_{number}": 1 for number in range(400)}))
    assert note.startswith("400 arguments are") and note.endswith("and 392 more") and len(note) < 200


# issue 12: A3
def test_arguments_are_checked_where_the_shape_is_given_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "mp_rank_00").mkdir(parents=True)
    state = {"args": argparse.Namespace(**llama(softmax_scale=8.0)), "checkpoint_version": 3.0, "model": {}}
    torch.save(state, source / "mp_rank_00/model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="softmax_scale=8.0"):
        open_checkpoint(source, shape=shape(SMALL))


# issue 12: A3
@pytest.mark.parametrize(
    "more,tanh",
    [
        ({"openai_gelu": True, "bias_gelu_fusion": False}, False),  # Megatron-Core's model never reads it
        ({"openai_gelu": True, "bias_gelu_fusion": False, "use_legacy_models": True}, True),
        ({"openai_gelu": False, "bias_gelu_fusion": True}, True),
        ({"openai_gelu": False, "bias_gelu_fusion": False}, False),
    ],
)
def test_gelu_is_the_one_that_the_run_computed(more: dict[str, Any], tanh: bool) -> None:
    for version in VERSIONS:
        assert shape_of_arguments(defaults(version) | more).openai_gelu is tanh


ARGUMENTS = """
def _add_network_size_args(parser):
    exclude = ["callback"]
    ArgumentGroupFactory(TransformerConfig, exclude=exclude).build_group(parser, "network")
    group = parser.add_argument_group(title="network size")
    group.add_argument("--fork-switch", action="store_true")
    group.add_argument("--lr", type=float, default=1.5, dest="lr")
def validate_args(args):
    args.derived_by_fork = 1
"""
CONFIG = """
class ModelParallelConfig:
    fork_parallel: int = 3
class TransformerConfig(ModelParallelConfig):
    callback: object = None
    hidden_size: int = field(default=0, metadata={"argparse_meta": {"default": None}})
    fork_profile: bool = field(default=False, metadata={"argparse_meta": {"dest": "profiled_by_fork"}})
    fork_list: list = field(default_factory=lambda: [1])
"""


# issue 12: A3
def test_the_script_fails_on_an_argument_that_is_not_classified(tmp_path: Path) -> None:
    for name, text in (("training/arguments.py", ARGUMENTS), ("core/transformer/transformer_config.py", CONFIG)):
        path = tmp_path / "megatron" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = arguments_of_checkout(tmp_path)
    assert found.parsed == {
        "fork_switch": False, "lr": 1.5, "hidden_size": None, "profiled_by_fork": False, "fork_list": [1],
        "fork_parallel": 3,
    }  # fmt: skip
    assert {"callback", "derived_by_fork"} <= found.taken
    done = run(tmp_path, code=1, module="tools.checkpoint.megatron_arguments")
    assert "fork_switch  (default False)" in done.stdout and "derived_by_fork" in done.stdout
    assert "hidden_size" not in done.stdout
