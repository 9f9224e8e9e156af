"""A stage starts only from a checkpoint of its own model; what only training uses may differ until it has started."""

from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory import Ancestor
from megagrow.config import GrowthConfig, load
from megagrow.errors import CheckpointError
from megagrow.training.state import find_start, schedule_settings
from tests.unit.stages.stage_family import large_shape, write_family, write_source
from tools.reference.tiny_checkpoint import SMALL, shape

LLAMA_31: dict[str, Any] = {"rotary_base": 500000, "rope_scaling_factor": 8.0, "layernorm_epsilon": 1e-6}


def place(folder: Path, of: Any, **manifest: Any) -> Path:
    """Write a checkpoint where the stage keeps its own."""
    return write_source(folder / "runs" / "grown" / "checkpoints", of, optimizer=True, stage="grown", **manifest)


# issue 12: A1
def test_all_differences_of_the_function_are_named(tmp_path: Path) -> None:
    path = place(tmp_path, large_shape(**LLAMA_31))
    file = write_family(tmp_path, large_shape())
    with pytest.raises(CheckpointError) as caught:
        find_start(load(file, []), 0)
    for words in (
        "layernorm_epsilon is 1e-06 in the checkpoint and 1e-05 in the stage",
        "rotary_base is 500000 in the checkpoint and 10000 in the stage",
        "rope_scaling_factor is 8.0 in the checkpoint and None in the stage",
    ):
        assert words in str(caught.value)
    same = [f"stages.0.model.{name}={value}" for name, value in LLAMA_31.items()]
    assert find_start(load(file, same), 0).path == path


# issue 12: A1
def test_a_training_setting_may_differ_until_the_stage_has_started(tmp_path: Path) -> None:
    file = write_family(tmp_path, large_shape())
    path = place(tmp_path, large_shape(seq_length=16, attention_dropout=0.1))
    assert find_start(load(file, []), 0).path == path
    started = schedule_settings(load(file, []), 0)
    place(tmp_path, large_shape(attention_dropout=0.1), iteration=11, schedule=started)
    with pytest.raises(CheckpointError, match=r"attention_dropout is 0.1 in the checkpoint and 0.0 in the stage"):
        find_start(load(file, []), 0)


# issue 12: A1
def test_a_checkpoint_that_an_earlier_version_grew_wrongly_is_refused(tmp_path: Path) -> None:
    parent = Ancestor(
        path="/models/llama", sha256="0" * 64, family="x", stage="llama", iteration=0, noise=0.0, seed=1, exact=True,
        shape=shape(SMALL, rotary_base=500000), operators={"hidden": "zero_pad"}, moments="exact", version="0.1.0",
        options=GrowthConfig(),
    )  # fmt: skip
    place(tmp_path, large_shape(), lineage=(parent,))
    with pytest.raises(CheckpointError, match="rotary_base changes from 500000 to 10000.*convert /models/llama again"):
        find_start(load(write_family(tmp_path, large_shape()), []), 0)


def test_a_size_that_is_left_out_and_its_equal_number_are_one_shape(tmp_path: Path) -> None:
    """Positions, channels and groups: a trained stage goes on when its yaml leaves out what equals the default."""
    plain = large_shape(num_attention_heads=2, num_query_groups=None, kv_channels=None)
    file = write_family(tmp_path, plain)
    started = schedule_settings(load(file, []), 0)
    named = plain.model_copy(update={"max_position_embeddings": 4096, "kv_channels": 6, "num_query_groups": 2})
    path = place(tmp_path, named, iteration=11, schedule=started)
    assert find_start(load(file, []), 0).path == path
    with pytest.raises(CheckpointError, match="num_query_groups is 2 in the checkpoint and 1 in the stage"):
        find_start(load(file, ["stages.0.model.num_query_groups=1"]), 0)
