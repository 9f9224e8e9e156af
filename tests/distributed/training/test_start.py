"""Where a stage resumes: what `find_start` reads from a checkpoint, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory.manifest import read_manifest
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.errors import CheckpointError, LaunchError
from megagrow.training.state import find_start, schedule_settings
from tests.distributed.ranks.families import stage, write_family
from tools.reference.tiny_checkpoint import random_state, write_checkpoint

MODEL = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "num_query_groups": 2}


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A family whose stage is at iteration 10, with the schedule and the threads that it was started with."""
    file = write_family(tmp_path / "family", tmp_path / "text.jsonl", [stage("one", MODEL)])
    family = load(file)
    of = family.stages[0].model
    kept: dict[str, Any] = {"stage": "one", "schedule": schedule_settings(family, 0), "threads": 3}
    write_checkpoint(FamilyPaths(family).stage(0).checkpoints, of, random_state(of), **kept)
    return file


def changed(file: Path, *overrides: str) -> Family:
    return load(file, overrides)


def test_a_stage_resumes_from_its_checkpoint_with_its_threads(started: Path) -> None:
    start = find_start(changed(started), 0)
    assert (start.iteration, start.threads, start.position.total) == (10, 3, 80)
    assert start.path is not None and read_manifest(start.path).schedule == schedule_settings(changed(started), 0)
    assert not start.restores_rng, "a checkpoint without RNG states has none to restore"


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("stages.0.schedule.max_lr=1e-3", "max_lr=0.003, not 0.001"),
        ("stages.0.schedule.lr_decay_style=constant", "schedule.lr_decay_style=cosine, not constant"),
        ("stages.0.train_tokens=100000", "iterations=20, not 390"),
    ],
)
def test_another_schedule_is_refused_unless_it_is_requested(started: Path, override: str, change: str) -> None:
    with pytest.raises(
        LaunchError, match=f"is at iteration 10 and was trained with {change}: restore the old value, set"
    ):
        find_start(changed(started, override), 0)
    assert (
        find_start(changed(started, override, "stages.0.schedule.override_opt_param_scheduler=true"), 0).iteration == 10
    )


def test_another_shape_is_refused_with_both_values(started: Path) -> None:
    with pytest.raises(CheckpointError, match="ffn_hidden_size is 24 in the checkpoint and 32 in the stage"):
        find_start(changed(started, "stages.0.model.ffn_hidden_size=32"), 0)
