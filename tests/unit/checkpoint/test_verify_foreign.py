"""`megagrow verify` of checkpoints that megagrow did not write: what it checks, and what it reports as not checked."""

import json
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.formats.huggingface.safetensors_header import read_header
from tests.reference.command_line import CommandLine, megagrow
from tests.unit.huggingface.test_huggingface import exported
from tests.unit.sources.test_named_refusals import with_states
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

__all__ = ["megagrow"]


def test_a_hugging_face_directory(tmp_path: Path, megagrow: CommandLine) -> None:
    said = megagrow.done("verify", exported(tmp_path / "model", "llama"))
    for part in ("ok    Hugging Face (llama)", "ok    every tensor of the shape is there", "ok    values are finite"):
        assert part in said, said
    assert "not checked: whether a value has changed" in said and "not checked: where it comes from" in said
    told = json.loads(megagrow.done("verify", tmp_path / "model", "--json"))
    assert len(told["unchecked"]) == 2 and not told["faults"] and told["tensors"] > 5


def test_values_that_are_not_finite_are_found(tmp_path: Path, megagrow: CommandLine) -> None:
    file = exported(tmp_path / "model", "llama") / "model.safetensors"
    content = bytearray(file.read_bytes())
    entry = read_header(file)["model.norm.weight"]
    content[entry.offset : entry.offset + 4] = b"\x00\x00\xc0\x7f"  # NaN
    file.write_bytes(content)
    code, _, error = megagrow("verify", tmp_path / "model")
    assert code == 2 and "decoder.final_layernorm.weight" in error and "1 values are not finite" in error


def test_a_damaged_directory_is_a_fault_and_no_traceback(tmp_path: Path, megagrow: CommandLine) -> None:
    file = exported(tmp_path / "model", "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    code, _, error = megagrow("verify", tmp_path / "model")
    assert code == 2 and "model.safetensors" in error and "Traceback" not in error


def test_a_checkpoint_of_megatron_lm(tmp_path: Path, megagrow: CommandLine) -> None:
    said = megagrow.done("verify", with_states(tmp_path / "source", {}))
    assert "every tensor of the shape is there" in said and "not checked: where it comes from" in said


@pytest.mark.parametrize("words", [("--text", "a.txt"), ("--data", "a"), ("--tokenizer", "a.model")])
def test_tokens_without_deep_are_refused(tmp_path: Path, megagrow: CommandLine, words: tuple[str, str]) -> None:
    source = write_checkpoint(tmp_path / "source", shape(SMALL), random_state(shape(SMALL), dtype=torch.float32))
    assert "are for --deep" in megagrow.refused("verify", source, *words)


def test_a_parent_of_a_foreign_checkpoint_is_for_deep(tmp_path: Path, megagrow: CommandLine) -> None:
    path = exported(tmp_path / "model", "llama")
    code, _, error = megagrow("verify", path, "--parent", path)
    assert code == 2 and "has no lineage" in error and "--deep" in error


def test_heads_keep_their_size_where_only_the_width_is_given(tmp_path: Path, megagrow: CommandLine) -> None:
    """config.json of a Llama names no head_dim: it follows from the sizes, and would change with them."""
    path = exported(tmp_path / "model", "llama")
    megagrow.done("convert", path, tmp_path / "grown", "model.hidden_size=32", "model.num_attention_heads=8")
    found = json.loads(megagrow.done("inspect", tmp_path / "grown", "--json"))["shape"]
    assert (found["hidden_size"], found["num_attention_heads"], found["kv_channels"]) == (32, 8, 6)
