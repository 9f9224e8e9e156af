"""A layout that does not divide the vocabulary: rows of padding are added, reported, and leave the function alone."""

from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.directory import read_manifest
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.index import whole_box
from tests.reference.command_line import CommandLine, megagrow
from tests.unit.huggingface.test_huggingface import exported
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

__all__ = ["megagrow"]
EMBEDDING = "embedding.word_embeddings.weight"
TP4 = ("parallel.tensor_model_parallel_size=4", "model.num_query_groups=4")


def rows(path: Path, key: str = EMBEDDING) -> torch.Tensor:
    source = open_checkpoint(path).source
    return source.read(key, whole_box(source.tensors[key].shape))


def test_a_layout_pads_by_itself(tmp_path: Path, megagrow: CommandLine) -> None:
    """50 tokens and two ranks divide; 50 and four do not."""
    source = exported(tmp_path / "model", "gpt_neox")
    code, said, error = megagrow("convert", source, tmp_path / "made", "parallel.tensor_model_parallel_size=4")
    assert code == 0, error
    assert "the vocabulary of 50 is padded to 52 rows instead of 50; no token's logit changes" in " ".join(
        error.split()
    )
    assert "vocab fresh" in said and "; exact" in said and "does not preserve" not in said
    made = next((tmp_path / "made").glob("iter_*"))
    of = read_manifest(made).shape
    assert (of.vocab_size, of.padded_vocab_size) == (50, 52)
    for key in (EMBEDDING, "output_layer.weight"):
        assert torch.equal(rows(made, key)[:50], rows(source, key))
    megagrow.done("convert", made, tmp_path / "back", "--to", "huggingface")
    assert torch.equal(rows(tmp_path / "back"), rows(source))


def test_two_ranks_need_no_padding(tmp_path: Path, megagrow: CommandLine) -> None:
    source = exported(tmp_path / "model", "gpt_neox")
    code, _, error = megagrow("convert", source, tmp_path / "made", "parallel.tensor_model_parallel_size=2")
    assert code == 0 and "padded" not in error


def test_padding_that_was_given_is_obeyed(tmp_path: Path, megagrow: CommandLine) -> None:
    source = exported(tmp_path / "model", "gpt_neox")
    words = ("convert", source, tmp_path / "made", "parallel.tensor_model_parallel_size=4")
    error = megagrow.refused(*words, "model.make_vocab_size_divisible_by=50")
    assert "does not divide padded vocabulary 50" in error
    megagrow.done(*words, "model.make_vocab_size_divisible_by=64")
    assert read_manifest(next((tmp_path / "made").glob("iter_*"))).shape.padded_vocab_size == 64


@pytest.mark.parametrize(("size", "kept"), [(30, True), (32, False)])
def test_new_tokens_are_not_padding(tmp_path: Path, megagrow: CommandLine, size: int, kept: bool) -> None:
    of = shape(SMALL)
    source = write_checkpoint(tmp_path / "source", of, random_state(of, optimizer=False))
    words = [f"model.vocab_size={size}", "model.make_vocab_size_divisible_by=32"]
    said = megagrow.done("convert", source, tmp_path / "made", *words)
    assert ("does not preserve the function" in said) != kept
