"""Stages whose samples have different lengths: tokens are counted right, losses compare, places in the data go on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagrow import records
from megagrow.checkpoint.directory import read_manifest
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.data.record import read_prepared
from megagrow.data.stream import Position, TrainStream
from megagrow.plan import family_plan
from megagrow.records import EvalRecord, StepRecord
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, SEQUENCE, WIDER
from tests.reference.command import ROOT, megagrow

pytestmark = pytest.mark.timeout(600)
STEPS, BATCH = 6, 8
SHORT, LONG = SEQUENCE * BATCH, 2 * SEQUENCE * BATCH


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family whose second stage reads samples of twice the length, and whose third reads short ones again."""
    root = tmp_path_factory.mktemp("family")
    rotary: dict[str, Any] = {"max_position_embeddings": 4 * SEQUENCE}
    stages = [
        families.stage("small", LLAMA | rotary, train_tokens=STEPS * SHORT),
        families.stage("long", LLAMA | WIDER | rotary, "PP2", train_tokens=STEPS * LONG),
        families.stage("last", LLAMA | WIDER | rotary | {"num_layers": 8}, train_tokens=STEPS * SHORT),
    ]
    stages[1]["model"]["seq_length"] = 2 * SEQUENCE
    text = families.write_text(root / "text.jsonl")
    file = families.write_family(root / "family", text, stages, checkpoint={"save_interval": 3, "keep": 9})
    done = megagrow("run", file)
    assert done.returncode == 0, done.stderr
    return load(file)


def test_tokens_and_places_are_counted(family: Family) -> None:
    assert [stage.iterations for stage in family_plan(family).stages] == [STEPS] * 3
    tokens, consumed = 0, []
    for index, per_step in enumerate((SHORT, LONG, SHORT)):
        paths = FamilyPaths(family).stage(index)
        grown = read_manifest(paths.first_checkpoint) if index else None
        end = read_manifest(paths.checkpoints / f"iter_{STEPS:07d}")
        if grown is not None:
            assert grown.consumed_tokens == tokens and sum(grown.position.values()) * per_step // BATCH == tokens
        tokens += STEPS * per_step
        assert end.consumed_tokens == tokens
        assert end.history is not None and end.history.tokens == STEPS * per_step
        consumed.append(sum(end.position.values()))
    short = STEPS * BATCH
    assert consumed == [short, short // 2 + short, 2 * (short // 2 + short) + short]


def test_validation_compares_before_and_after_a_growth(family: Family) -> None:
    losses = []
    for index in range(3):
        found = records.read(FamilyPaths(family).stage(index).records)
        losses.append([record.loss for record in found if isinstance(record, EvalRecord)])
    for before, after in zip(losses, losses[1:], strict=False):
        assert after[0] == pytest.approx(before[-1], abs=1e-5)


def test_steps_train_on_samples_of_the_stages_length(family: Family) -> None:
    prepared = read_prepared(family)
    for index, length in enumerate((SEQUENCE, 2 * SEQUENCE, SEQUENCE)):
        sample = TrainStream(prepared, family, Position({}), index).sample(0)
        assert len(sample["tokens"]) == len(sample["labels"]) == length
    steps = [record for record in records.read(FamilyPaths(family).stage(1).records) if isinstance(record, StepRecord)]
    assert len(steps) == STEPS


def test_a_stage_that_was_killed_ends_alike(family: Family, tmp_path: Path) -> None:
    """The same command after a loss of everything from step 3 on."""
    save = families.rewind(Path(family.save), tmp_path / "copy", "long", 3)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megagrow"]
    words = ["train", str(Path(family.save).with_name("family.yaml")), "--stage", "long", f"save={save}"]
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], env=given, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = []
    for place in (Path(family.save), save):
        lines = map(json.loads, (place / "long" / "records.jsonl").read_text().splitlines())
        losses.append({line["iteration"]: line["loss"] for line in lines if line["kind"] == "step"})
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 33, "does not divide seq_length 33"),
        ({"context_parallel_size": 2}, 34, "does not divide seq_length 34"),
    ],
)
def test_validation_samples_must_fit_a_layout(
    tmp_path: Path, layout: dict[str, Any], length: int, message: str
) -> None:
    stages = [families.stage("small", LLAMA), families.stage("long", LLAMA | WIDER)]
    stages[0]["model"]["seq_length"], stages[1]["parallel"] = length, layout
    done = megagrow("plan", families.write_family(tmp_path / "family", tmp_path / "text.jsonl", stages))
    assert done.returncode == 2 and message in done.stderr and "all validation samples" in done.stderr, done.stderr
