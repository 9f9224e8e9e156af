"""What goes into a stage is what the stage specifies, wherever a checkpoint meets a family.yaml."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory import Ancestor, read_manifest
from megagrow.config import GrowthConfig, ModelShape
from tests.reference.command_line import CommandLine, megagrow
from tests.unit.stages.stage_family import large_shape, write_family, write_source
from tools.reference.tiny_checkpoint import SMALL, shape

__all__ = ["megagrow"]

ROOT = Path(__file__).parents[3]

LLAMA_31: dict[str, Any] = {"rotary_base": 500000, "rope_scaling_factor": 8.0, "layernorm_epsilon": 1e-6}
GPT: dict[str, Any] = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
    "add_bias_linear": True,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 12, "kv_channels": 4}
# name: (what the source is, what the stage is, what the error must say)
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "theta": ({"rotary_base": 500000}, {}, "rotary_base changes from 500000 to 10000"),
    "scaling": ({"rope_scaling_factor": 8.0}, {}, "rope_scaling_factor changes from 8.0 to None"),
    "scaling in the stage": ({}, {"rope_scaling_factor": 8.0}, "rope_scaling_factor changes from None to 8.0"),
    "rotated share": ({"rotary_percent": 0.5}, {}, "rotary_percent changes from 0.5 to 1.0"),
    "epsilon": ({"layernorm_epsilon": 1e-6}, {}, "layernorm_epsilon changes from 1e-06 to 1e-05"),
    "norm": ({"normalization": "LayerNorm"}, {}, "normalization changes from LayerNorm to RMSNorm"),
    "activation": ({"swiglu": False}, {}, "swiglu changes from False to True"),
    "kind of gelu": ({"swiglu": False, "openai_gelu": True}, {"swiglu": False}, "openai_gelu changes from True to Fal"),
    "biases": ({"add_bias_linear": True}, {}, "add_bias_linear changes from True to False"),
    "biases of q, k and v": ({"add_qkv_bias": True}, {}, "add_qkv_bias changes from True to False"),
    "norms of q and k": ({"qk_layernorm": True}, {}, "qk_layernorm changes from True to False"),
    "tied": (
        {"untie_embeddings_and_output_weights": False}, {},
        "untie_embeddings_and_output_weights changes from False to True",
    ),
    "positions": (GPT, {}, "position_embedding_type changes from learned_absolute to rope"),
    "learned positions": (
        {**GPT, "max_position_embeddings": 16}, {**GPT, "max_position_embeddings": 32},
        "max_position_embeddings changes from 16 to 32",
    ),
    "head_dim": ({"kv_channels": 6}, {}, "kv_channels changes from 6 to 4"),
    "layers": ({"num_layers": 4}, {}, "num_layers shrinks from 4 to 3"),
    "hidden": ({"hidden_size": 16}, {}, "hidden_size shrinks from 16 to 12"),
    "ffn": ({"ffn_hidden_size": 32}, {}, "ffn_hidden_size shrinks from 32 to 20"),
    "heads": ({"num_attention_heads": 6}, {}, "num_attention_heads shrinks from 6 to 4"),
    "groups": ({"num_query_groups": 4}, {}, "num_query_groups shrinks from 4 to 2"),
    "vocabulary": ({"vocab_size": 40}, {}, "padded_vocab_size shrinks from 40 to 30"),
    "experts": (MIXTURE, {}, "num_moe_experts 4 cannot become a dense MLP"),
    "fewer experts": (MIXTURE, {**MIXTURE, "num_moe_experts": 2}, "num_moe_experts shrinks from 4 to 2"),
    "router": ({**MIXTURE, "moe_router_topk": 3}, MIXTURE, "moe_router_topk shrinks from 3 to 2"),
    "shared expert": (
        {**MIXTURE, "moe_shared_expert_intermediate_size": 8}, MIXTURE,
        "moe_shared_expert_intermediate_size shrinks from 8 to 0",
    ),
}  # fmt: skip


# issue 12: A1
@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_source_that_differs_from_the_stage_is_refused(tmp_path: Path, megagrow: CommandLine, name: str) -> None:
    of, stage, message = DIFFERENCES[name]
    source = write_source(tmp_path / "source", large_shape(**of))
    family = write_family(tmp_path, large_shape(**stage))
    error = megagrow.refused("convert", family, "--stage", "grown", "--source", source)
    assert message in error and str(source) in error
    assert megagrow.refused("convert", family, "--stage", "grown", "--source", source, "--dry-run") == error
    assert not list((tmp_path / "runs").rglob("iter_*"))


# issue 12: A1
def test_all_differences_are_in_one_error_with_what_to_set(tmp_path: Path, megagrow: CommandLine) -> None:
    source = write_source(tmp_path / "source", large_shape(**LLAMA_31, num_layers=4))
    error = megagrow.refused("convert", write_family(tmp_path, large_shape()), "--stage", "grown", "--source", source)
    assert "rotary_base changes from 500000 to 10000" in error and "num_layers shrinks from 4 to 3" in error
    assert "rope_scaling_factor changes from 8.0 to None" in error and "from 1e-06 to 1e-05" in error
    cure = "the target must have layernorm_epsilon: 1e-06, rotary_base: 500000, rope_scaling_factor: 8.0;"
    assert cure in error


# issue 12: A1
@pytest.mark.parametrize("to", ["huggingface", "legacy"])
def test_an_export_of_a_stage_is_the_stages_model(tmp_path: Path, megagrow: CommandLine, to: str) -> None:
    source = write_source(tmp_path / "source", large_shape(**LLAMA_31))
    family, out = write_family(tmp_path, large_shape()), tmp_path / "out"
    words = ("convert", family, "--stage", "grown", "--source", source, "--to", to, "--save", out)
    error = megagrow.refused(*words)
    for name, one, other in (("rotary_base", 500000, 10000), ("layernorm_epsilon", 1e-06, 1e-05)):
        assert f"{name} is {one} in the checkpoint and {other} in the model to export" in error
    assert "rope_scaling_factor is 8.0" in error and not out.exists()
    megagrow.done(*words[:2], *[f"stages.0.model.{name}={value}" for name, value in LLAMA_31.items()], *words[2:])


# issue 12: A1
def test_settings_given_for_a_source_that_records_them_must_agree(tmp_path: Path, megagrow: CommandLine) -> None:
    source, out = write_source(tmp_path / "source", large_shape()), tmp_path / "out"
    for to in ("torch_dist", "legacy"):
        error = megagrow.refused("convert", source, out, "source.rotary_base=500000", "--to", to)
        assert "rotary_base is 10000 in the checkpoint and 500000" in error and not out.exists()
    megagrow.done("convert", source, out, "source.rotary_base=10000")


def place(folder: Path, of: ModelShape, **manifest: Any) -> Path:
    """Write a checkpoint where the stage keeps its own."""
    return write_source(folder / "runs" / "grown" / "checkpoints", of, stage="grown", **manifest)


# issue 12: A1
def test_verify_and_train_refuse_a_checkpoint_of_another_function(tmp_path: Path, megagrow: CommandLine) -> None:
    place(tmp_path, large_shape(**LLAMA_31), optimizer=True)
    family = write_family(tmp_path, large_shape())
    code, _, error = megagrow("verify", family, "--stage", "grown")
    assert code == 2 and "rotary_base is 500000 in the checkpoint and 10000 in the stage" in error
    assert "layernorm_epsilon is 1e-06" in error and "rope_scaling_factor is 8.0" in error
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", "train", str(family), "--stage", "grown"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("megagrow: error: "), done.stderr
    assert "rotary_base=500000, not 10000" in last and "rope_scaling_factor=8.0, not null" in last
    same = [f"stages.0.model.{name}={value}" for name, value in LLAMA_31.items()]
    assert "0 faults" in megagrow.done("verify", family, *same, "--stage", "grown")


# issue 12: A1
def test_a_checkpoint_that_an_earlier_version_grew_wrongly_is_found(tmp_path: Path, megagrow: CommandLine) -> None:
    parent = Ancestor(
        path="/models/llama", sha256="0" * 64, family="x", stage="llama", iteration=0, noise=0.0, seed=1, exact=True,
        shape=shape(SMALL, rotary_base=500000), operators={"hidden": "zero_pad"}, moments="exact", version="0.1.0",
        options=GrowthConfig(),
    )  # fmt: skip
    path = place(tmp_path, large_shape(), optimizer=True, lineage=(parent,))
    code, _, error = megagrow("verify", path)
    assert code == 2 and "rotary_base changes from 500000 to 10000" in error and "convert /models/llama again" in error


# issue 12: A1
@pytest.mark.parametrize(
    ("of", "stage"),
    [
        ({"seq_length": 4096}, {}),
        ({"seq_length": 4096, "max_position_embeddings": 4096}, {}),
        ({**GPT, "max_position_embeddings": 64, "seq_length": 64}, {**GPT, "max_position_embeddings": 64}),
        ({"attention_dropout": 0.1, "init_method_std": 0.006, "nominal_parameters": 1e9}, {}),
        ({"rope_scaling_factor": 1.0}, {}),
        # a source that does not know its tokens has padded ones: 32 rows are 30 tokens, or 31, in multiples of 2
        ({"vocab_size": 32}, {"vocab_size": 31}),
        ({"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2}, {}),
        ({}, {"num_moe_experts": 4, "moe_ffn_hidden_size": 20}),
        (MIXTURE, {**MIXTURE, "num_moe_experts": 8, "moe_router_topk": 4, "moe_ffn_hidden_size": 16}),
    ],
)
def test_what_is_no_part_of_the_function_may_differ(
    tmp_path: Path, megagrow: CommandLine, of: dict[str, Any], stage: dict[str, Any]
) -> None:
    source = write_source(tmp_path / "source", large_shape(**of))
    family = write_family(tmp_path, large_shape(**stage))
    megagrow.done("convert", family, "--stage", "grown", "--source", source)
    assert "0 faults" in megagrow.done("verify", family, "--stage", "grown")


# issue 12: A1
def test_a_stage_has_its_own_seq_length_and_counts_its_place_in_it(tmp_path: Path, megagrow: CommandLine) -> None:
    source = write_source(
        tmp_path / "source", large_shape(seq_length=16), consumed_tokens=1600, position={"a": 90, "b": 10}
    )
    megagrow.done("convert", write_family(tmp_path, large_shape()), "--stage", "grown", "--source", source)
    manifest = read_manifest(next((tmp_path / "runs").rglob("iter_*")))
    assert manifest.shape == large_shape() and manifest.position == {"a": 180, "b": 20}
    assert (manifest.consumed_samples, manifest.consumed_tokens) == (200, 1600)
