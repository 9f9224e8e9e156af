"""Families whose first stage begins with a checkpoint from elsewhere: trained on, or taken as finished.

The checkpoint holds random weights. Its first validation loss is what a forward of those weights gives, whatever format
they came in, so all formats must agree.
"""

from pathlib import Path
from typing import Any

import pytest

from megagrow import records
from megagrow.checkpoint.directory import read_manifest
from megagrow.config import load
from megagrow.config.paths import FamilyPaths
from megagrow.plan import family_plan
from megagrow.records import ConversionRecord
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP, WIDER
from tests.reference.command import error_of, megagrow
from tools.reference.tiny_checkpoint import random_state, shape, write_checkpoint

pytestmark = pytest.mark.timeout(900)
POSITIONS = 4096
SOURCES: dict[str, tuple[str, ...]] = {
    "huggingface": ("--to", "huggingface"),
    "legacy": ("--to", "legacy"),
    "torch_dist": ("--no-optimizer",),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another family: random weights with Adam's state, made for more positions than are trained."""
    sizes = {
        "vocab_size": 320,
        "make_vocab_size_divisible_by": 64,
        "kv_channels": 8,
        "max_position_embeddings": POSITIONS,
    }
    of = shape({}, **LLAMA | sizes | {"seq_length": POSITIONS})
    return write_checkpoint(tmp_path_factory.mktemp("parent"), of, random_state(of), family="other")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on."""
    return families.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def write(folder: Path, text: Path, source: Path, *, finished: bool, **model: Any) -> Path:
    """A family that begins with a checkpoint and grows it."""
    first: dict[str, Any] = {"load": str(source), "train_tokens": 2 * TOKENS_PER_STEP}
    if finished:
        first |= {"finished": True, "train_tokens": "auto"}
    small = families.stage("small", LLAMA | {"max_position_embeddings": POSITIONS} | model, **first)
    large = families.stage(
        "large", LLAMA | WIDER | {"max_position_embeddings": POSITIONS} | model, train_tokens=2 * TOKENS_PER_STEP,
        export="huggingface",
    )  # fmt: skip
    return families.write_family(folder / "family", text, [small, large])


def test_every_format_is_trained_on_grown_and_exported(parent: Path, text: Path, tmp_path: Path) -> None:
    first: dict[str, float] = {}
    for name, options in SOURCES.items():
        source = tmp_path / name / "source"
        assert megagrow("convert", parent, source, *options).returncode == 0
        file = write(tmp_path / name, text, source, finished=False)
        done = megagrow("run", file)
        assert done.returncode == 0, done.stderr
        assert "which has no moments: Adam begins with new ones" in done.stderr
        family = load(file)
        before, after = families.validation(family), families.validation(family, 1)
        first[name] = before[0]
        assert after[0] == pytest.approx(before[2], abs=1e-5)
        last = FamilyPaths(family).stage(1).checkpoints
        found = read_manifest(last / "iter_0000002")
        assert found.consumed_tokens == 4 * TOKENS_PER_STEP  # of this family's data, not of the parent's
        assert [(each.stage, each.iteration) for each in found.lineage] == [("small", 2)]
        assert f'"max_position_embeddings": {POSITIONS}' in (family.save / "large/huggingface/config.json").read_text()
    assert first["legacy"] == pytest.approx(first["torch_dist"], abs=1e-5)
    assert first["huggingface"] == pytest.approx(first["torch_dist"], abs=1e-5)
    deep = megagrow(
        "verify", last / "iter_0000000", "--deep", "--parent", family.save / "small/checkpoints/iter_0000002"
    )
    assert deep.returncode == 0 and "0 faults" in deep.stdout, (deep.stdout, deep.stderr)


def test_a_finished_parent_keeps_its_moments_and_costs_nothing(parent: Path, text: Path, tmp_path: Path) -> None:
    file = write(tmp_path, text, parent, finished=True)
    done = megagrow("run", file)
    assert done.returncode == 0, done.stderr
    family = load(file)
    plan = family_plan(family)
    assert (plan.stages[0].iterations, plan.stages[0].tokens, plan.flops) == (0, 0, plan.stages[1].flops)
    assert "train-small" not in done.stderr and "train-large" in done.stderr
    assert "Stage small is finished: it is the checkpoint" in " ".join(done.stdout.split())
    assert families.steps(family, 1)[-1].consumed_tokens == 2 * TOKENS_PER_STEP
    made = [record for record in records.read(FamilyPaths(family).records) if isinstance(record, ConversionRecord)]
    assert [(record.moments, bool(record.operators)) for record in made] == [
        ("asymmetric", False),
        ("asymmetric", True),
    ]
    again = megagrow("run", file)
    assert again.returncode == 0 and again.stderr.count("already finished") == 6
    assert "nothing to train" in error_of(megagrow("train", file, "--stage", "small"))
    other = error_of(megagrow("status", file, f"stages.0.load={tmp_path}"))
    assert f"was made with load={parent}, not {tmp_path}" in other


def test_what_is_not_the_stages_model_is_not_loaded(parent: Path, text: Path, tmp_path: Path) -> None:
    """Growth has a stage of its own: a smaller checkpoint is not filled up with zeros on the way in."""
    for model, words in (
        ({"hidden_size": 40}, "hidden_size is 32 in it and 40 in the stage"),
        ({"num_layers": 5}, "num_layers is 4 in it and 5 in the stage"),
        ({"rotary_base": 500000}, "rotary_base changes from 10000 to 500000"),
    ):
        file = write(tmp_path, text, parent, finished=True, **model)
        assert words in error_of(megagrow("convert", file, "--stage", "small"))
    file = write(tmp_path, text, parent, finished=True)
    assert "is not stages.0.load" in error_of(megagrow("convert", file, "--stage", "small", "--source", tmp_path))
    assert "begins with" in error_of(megagrow("train", file, "stages.0.finished=false", "--stage", "small"))
    assert not (tmp_path / "family" / "small" / "checkpoints" / "iter_0000000").exists()
