"""What Megatron-LM needs of a converted checkpoint besides tensors: arguments, iteration and version."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.formats.megatron_common.arguments import arguments_of, shape_of_arguments
from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.pickles import zip_writer
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.config.function import filled
from megagrow.convert.run import TargetSpec, convert_checkpoint
from tools.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint

REST = {"vocab_size": 32, "make_vocab_size_divisible_by": 4}
OWN = {"lr": 3e-4, "micro_batch_size": 2, "consumed_train_samples": 640, "rank": 7, "moe_grouped_gemm": True}


def from_megatron_lm(path: Path) -> Path:
    """A checkpoint as written by Megatron-LM: without megagrow's files, with the arguments of its run."""
    small = shape(SMALL, **REST, max_position_embeddings=8)
    final = write_checkpoint(path, small, random_state(small))
    for name in ("megagrow.json", "integrity.json"):
        (final / name).unlink()
    args = arguments_of(small, ParallelLayout(), DType.FLOAT32) | OWN | {"attention_backend": AttnBackend.auto}
    common = {"iteration": 10, "args": argparse.Namespace(**args), "rerun_state_machine": {"mode": "validate_results"}}
    common["optimizer"] = {"optimizer": {"param_groups": [{"step": 10}]}}
    (final / "common.pt").write_bytes(zip_writer.save_small(common))
    return final


def converted(source: Path, save: Path, wanted: ModelShape, layout: ParallelLayout, **more: Any) -> dict[str, Any]:
    """The content of common.pt as Megatron-LM reads it."""
    convert_checkpoint(source, save, TargetSpec("x", wanted, layout, GrowthConfig(), "bf16", seed=1, **more))
    (final,) = (iterations.iteration_path(save, number) for number in iterations.published(save))
    common: dict[str, Any] = torch.load(
        final / "common.pt", weights_only=False
    )  # written by this test; Megatron-LM loads it the same way
    return common


@pytest.mark.parametrize("grown", [False, True])
def test_arguments_get_the_targets_shape_and_keep_the_rest(tmp_path: Path, grown: bool) -> None:
    source, layout = from_megatron_lm(tmp_path / "source"), ParallelLayout(tensor_model_parallel_size=2)
    wanted = shape(LARGE if grown else SMALL, **REST, max_position_embeddings=8)
    common = converted(source, tmp_path / "target", wanted, layout)
    args = common["args"]
    assert isinstance(args, argparse.Namespace)
    assert common["iteration"] == args.iteration == (0 if grown else 10) and common["checkpoint_version"] == 3.0
    assert shape_of_arguments(vars(args)) == wanted and args.tensor_model_parallel_size == 2
    # a grown model begins its schedule, and the samples that it is counted in
    assert (args.lr, args.consumed_train_samples, args.moe_grouped_gemm) == (3e-4, 0 if grown else 640, True)
    assert args.params_dtype == torch.bfloat16 and args.no_save_rng and not args.no_save_optim
    assert not hasattr(args, "rank") and not hasattr(args, "attention_backend") and "rerun_state_machine" not in common
    opened = open_checkpoint(tmp_path / "target")
    assert opened.shape == wanted and opened.layout == layout


def test_arguments_record_missing_moments(tmp_path: Path) -> None:
    source = from_megatron_lm(tmp_path / "source")
    common = converted(source, tmp_path / "target", shape(SMALL, **REST), ParallelLayout(), optimizer=False)
    assert common["args"].no_save_optim


def test_megagrows_own_checkpoints_get_arguments(tmp_path: Path) -> None:
    """Those of earlier versions had none, and Megatron-LM could not build their model."""
    small = shape(SMALL, **REST)
    source = write_checkpoint(tmp_path / "source", small, random_state(small))
    common = converted(source, tmp_path / "target", small, ParallelLayout(pipeline_model_parallel_size=2))
    assert "args" not in torch.load(source / "common.pt", weights_only=False)
    args = common["args"]
    assert isinstance(args, argparse.Namespace) and args.iteration == common["iteration"] == 10
    assert filled(shape_of_arguments(vars(args))) == filled(small) and args.pipeline_model_parallel_size == 2
