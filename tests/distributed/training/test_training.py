"""Training on real ranks: one curve in every layout, resumed to the last bit, grown without a step in the loss.

Two starts of Megatron-Core do everything, `alone` on one rank and `together` on two: each runs a list of
commands through `verb`. The tests then read records and checkpoints like any user.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megagrow.config import load
from megagrow.errors import CheckpointError
from tests.distributed.ranks import families
from tests.distributed.ranks.families import GPT, LAYOUTS, LLAMA, STEPS, TOKENS_PER_STEP, WIDER, Said, verb
from tests.distributed.ranks.launcher import run_ranks
from tests.distributed.ranks.wandb_files import is_a, records_of_runs

# generous: a test's time includes the fixtures that it is the first to need, on a machine that may be busy
pytestmark = pytest.mark.timeout(900)
DROPOUT = LLAMA | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
UNTIED = GPT | {"untie_embeddings_and_output_weights": True}
BF16 = {"precision": "bf16"}
STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "gpt": (GPT, {}),
    "untied": (UNTIED, {}),
    "bf16": (LLAMA, BF16),
    "dropout": (DROPOUT, {}),
    "dropout bf16": (DROPOUT, BF16),
}
ALONE = [f"{name} TP1" for name in STAGES]
TOGETHER = [f"llama {layout}" for layout in LAYOUTS if layout != "TP1"]
TOGETHER += ["gpt TP2", "gpt PP2", "dropout TP2", "dropout bf16 TP2"]
AGAIN = ["llama TP1", "dropout TP1", "dropout bf16 TP1", "dropout TP2", "dropout bf16 TP2"]
BALANCED = {"hidden": "balanced", "ffn": "balanced", "head": "balanced"}
GROWN = {
    "llama zero_pad TP2": ("llama", "TP2", {}, 1e-5),
    "llama balanced PP2": ("llama", "PP2", BALANCED, 1e-5),
    "untied zero_pad PP2": ("untied", "PP2", {}, 1e-5),
    "bf16 zero_pad TP2": ("bf16", "TP2", {}, 1e-3),
    "bf16 balanced PP2": ("bf16", "PP2", BALANCED, 1e-3),
}
GROWN_STEPS = 4
DAMAGES = ("flipped", "cut", "unlisted")


def place(root: Path, case: str) -> Path:
    """Directory that a case saves in."""
    return root / case.replace(" ", "-")


def file(root: Path, case: str) -> Path:
    """The family.yaml of a case."""
    return root / (case.replace(" ", "-") + ".yaml")


def write_families(root: Path) -> None:
    """Write the family.yaml of every case that trains from fresh weights or grows."""
    text = families.write_text(root / "text.jsonl")
    for case in (*ALONE, *TOGETHER):
        name, _, layout = case.partition(" bf16 ") if " bf16 " in case else case.partition(" ")
        shape, more = STAGES[f"{name} bf16" if " bf16 " in case else name]
        # a save costs as much as ten of these steps: only a case that is resumed needs one on the way
        saves = {"save_interval": 10 if case in AGAIN else STEPS}
        stages = [families.stage("small", shape, layout, **more)]
        families.write_family(place(root, case), text, stages, checkpoint=saves)
    for case, (name, layout, growth, _) in GROWN.items():
        shape, more = STAGES[name]
        wider = WIDER if shape is LLAMA else WIDER | {"ffn_hidden_size": 100, "num_query_groups": 6}
        large = families.stage(
            "large", shape | wider, layout, growth=growth, **more | {"train_tokens": GROWN_STEPS * TOKENS_PER_STEP}
        )
        families.write_family(place(root, case), text, [families.stage("small", shape, **more), large])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of all cases."""
    directory = tmp_path_factory.mktemp("training")
    write_families(directory)
    return directory


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """Results of one rank, from one start."""
    return run_ranks("tests.distributed.training.test_training:work_alone", 1, root)[0]


@pytest.fixture(scope="module")
def together(root: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """Results of two ranks, from one start, with the data and the grown checkpoints that one rank made."""
    return run_ranks("tests.distributed.training.test_training:work_together", 2, root)[0]


def train(root: Path, case: str, of: str | None = None, *overrides: str, stage: str = "small") -> Said:
    """Train a stage of the family of a case, or of the family `of` in the directory of the case."""
    family, save = file(root, of or case), place(root, case)
    if not (save / "data").exists() and os.environ["RANK"] == "0":
        families.lend(root / "data", save)
    return verb("train", family, "--stage", stage, f"save={save}", *overrides)


def rewind(root: Path, case: str, copy: str, iteration: int = 10) -> None:
    """Let `copy` be the family of a case as it was at an iteration; done on rank 0."""
    if os.environ["RANK"] == "0":
        families.rewind(place(root, case), place(root, copy), "small", iteration)


def again(root: Path, case: str) -> Said:
    """Train the second half of a case once more."""
    rewind(root, case, f"{case} again")
    return train(root, f"{case} again", case)


def work_alone(root: Path) -> dict[str, Any]:
    """The part of one rank: data, parents, resumed runs, damage, growth."""
    results = {"data": verb("data", file(root, ALONE[0]))}
    (place(root, ALONE[0]) / "data").rename(root / "data")
    results |= {case: train(root, case) for case in ALONE}
    results |= {f"{case} again": again(root, case) for case in AGAIN if case in ALONE}
    results["async"] = train(root, "async", "llama TP1", "checkpoint.async_save=true")
    rewind(root, "async", "async again")
    results["async again"] = train(root, "async again", "llama TP1", "checkpoint.async_save=true")
    for damage in DAMAGES:
        shutil.copytree(place(root, "llama TP1"), place(root, damage), symlinks=True)
        spoil(place(root, damage) / "small" / "checkpoints" / "iter_0000020", damage)
        results[damage] = train(root, damage, "llama TP1")
    results |= refused(root)
    for case, (name, *_) in GROWN.items():
        shutil.copytree(place(root, f"{name} TP1"), place(root, case), symlinks=True)
        results[f"convert {case}"] = verb("convert", file(root, case), "--stage", "large")
    trackers = ("trackers.wandb.enabled=true", "trackers.tensorboard=true")
    results["tracked"] = train(root, "tracked", "llama TP1", *trackers)
    records_of_runs(place(root, "tracked") / "small")  # W&B is done with what is copied now
    families.rewind(place(root, "tracked"), root / "moved", "small", 10).rename(place(root, "restarted"))
    results["restarted"] = train(root, "restarted", "llama TP1", *trackers)
    with mock.patch.dict(sys.modules, {"wandb": None}):
        results["untracked"] = train(root, "untracked", "llama TP1", trackers[0])
    return {"results": results, "digests": digests(root)}


def refused(root: Path) -> dict[str, Said]:
    """Runs that must end with an error."""
    results = {}
    shutil.copytree(place(root, "llama TP1"), place(root, "no tracker"), symlinks=True)
    (place(root, "no tracker") / "small" / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    results["no tracker"] = train(root, "no tracker", "llama TP1")
    shutil.copytree(place(root, "llama TP1"), place(root, "all damaged"), symlinks=True)
    for checkpoint in (place(root, "all damaged") / "small" / "checkpoints").glob("iter_*"):
        spoil(checkpoint, "flipped")
    results["all damaged"] = train(root, "all damaged", "llama TP1")
    for copy in ("not finite", "untouched"):
        rewind(root, "llama TP1", copy)
    wild = ("stages.0.schedule.max_lr=1e30", "stages.0.schedule.override_opt_param_scheduler=true")
    results["not finite"] = train(root, "not finite", "llama TP1", *wild)
    return results


def work_together(root: Path) -> dict[str, Any]:
    """The part of each of two ranks."""
    results = {case: train(root, case) for case in TOGETHER}
    results |= {f"{case} again": again(root, case) for case in AGAIN if case in TOGETHER}
    results["async TP2"] = train(root, "async TP2", "llama TP2", "checkpoint.async_save=true")
    rewind(root, "llama TP1", "TP1 to PP2")
    results["TP1 to PP2"] = train(root, "TP1 to PP2", "llama PP2")
    results |= {case: train(root, case, stage="large") for case in GROWN}
    return {"results": results, "digests": digests(root) if os.environ["RANK"] == "0" else {}}


def digests(root: Path) -> dict[str, str]:
    """The digest of the last checkpoint of the first stage of every family, by its directory's name."""
    from tools.proofs.kill_test import digest

    found = {}
    for tracker in root.glob("*/small/checkpoints/latest_checkpointed_iteration.txt"):
        checkpoint = tracker.parent / f"iter_{int(tracker.read_text()):07d}"
        if checkpoint.is_dir():
            found[tracker.parents[2].name] = digest(checkpoint)
    return found


def spoil(checkpoint: Path, damage: str) -> None:
    """Flip a bit in the middle of a data file, cut it short, or take the index away."""
    data = sorted(checkpoint.glob("*.distcp"))[-1]
    content = bytearray(data.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(content[: len(content) // 2])
    else:
        (checkpoint / ".metadata").unlink()


def curve_of(root: Path, case: str, of: str | None = None) -> list[float]:
    """Losses of a case's steps."""
    return families.curve(load(file(root, of or case), [f"save={place(root, case)}"]))


def validation_of(root: Path, case: str, of: str | None = None, index: int = 0) -> dict[int, float]:
    """Validation losses of a case's stage."""
    return families.validation(load(file(root, of or case), [f"save={place(root, case)}"]), index)


def assert_same_bits(root: Path, case: str, of: str, digest: dict[str, str]) -> None:
    """Losses, validation losses and the last checkpoint of two families are equal to the last bit."""
    assert curve_of(root, case, of) == curve_of(root, of)
    assert validation_of(root, case, of) == validation_of(root, of)
    assert digest[place(root, case).name] == digest[place(root, of).name]


@pytest.mark.parametrize("case", TOGETHER[:7])
def test_a_layout_changes_nothing(case: str, root: Path, alone: dict, together: dict) -> None:
    assert together["results"][case].code == 0, together["results"][case].text
    wanted = curve_of(root, f"{case.split()[0]} TP1")
    assert len(wanted) == STEPS and wanted[-1] < wanted[0] - 0.5, "it learned nothing"
    assert curve_of(root, case) == pytest.approx(wanted, rel=1e-5)
    assert validation_of(root, case) == pytest.approx(validation_of(root, f"{case.split()[0]} TP1"), rel=1e-5)


@pytest.mark.parametrize("case", AGAIN)
def test_a_resumed_run_ends_with_the_same_bits(case: str, root: Path, alone: dict, together: dict) -> None:
    result = (alone if case in ALONE else together)["results"][f"{case} again"]
    assert result.code == 0 and "iter_0000010" in result.text, result.text
    assert_same_bits(root, f"{case} again", case, alone["digests"] | together["digests"])
    assert curve_of(root, case) != curve_of(root, "llama TP1") or case == "llama TP1", "dropout or bf16 did nothing"


def test_a_run_resumes_in_another_layout(root: Path, together: dict) -> None:
    result = together["results"]["TP1 to PP2"]
    assert result.code == 0 and "iter_0000010" in result.text, result.text
    assert curve_of(root, "TP1 to PP2", "llama PP2") == pytest.approx(curve_of(root, "llama TP1"), rel=1e-5)


@pytest.mark.parametrize(
    ("case", "of"), [("async", "llama TP1"), ("async again", "llama TP1"), ("async TP2", "llama TP2")]
)
def test_saving_in_the_background_changes_nothing(case: str, of: str, root: Path, alone: dict, together: dict) -> None:
    result = (alone["results"] | together["results"])[case]
    assert result.code == 0 and result.text.count("saved ") == (2 if case == "async" else 1), result.text
    assert_same_bits(root, case, of, alone["digests"] | together["digests"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    damage: str, root: Path, alone: dict
) -> None:
    result, checkpoints = alone["results"][damage], place(root, damage) / "small" / "checkpoints"
    warning = next(line for line in result.text.splitlines() if "set aside" in line)
    assert result.code == 0 and str(checkpoints / "iter_0000020") in warning, result.text
    assert {"flipped": "sha256", "cut": "bytes", "unlisted": ".metadata is missing"}[damage] in warning
    assert f"resumes from {checkpoints / 'iter_0000010'}" in result.text
    assert (checkpoints / "iter_0000020.refused").is_dir()
    assert_same_bits(root, damage, "llama TP1", alone["digests"])


def test_what_cannot_be_resumed_ends_with_one_line(root: Path, alone: dict) -> None:
    for case, words in (
        ("no tracker", "has iterations [10, 20] but no latest_checkpointed_iteration.txt"),
        ("all damaged", "no whole checkpoint is left"),
        ("not finite", "at iteration"),
    ):
        result = alone["results"][case]
        errors = [line for line in result.text.splitlines() if line.startswith("megagrow: error: ")]
        assert result.code == CheckpointError.exit_code == 2 and "Traceback" not in result.text
        assert len(errors) == 1 and words in errors[0], result.text


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint_alone(root: Path, alone: dict) -> None:
    checkpoints = place(root, "not finite") / "small" / "checkpoints"
    assert [entry.name for entry in sorted(checkpoints.glob("*iter*"))] == [
        "iter_0000010", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip
    assert alone["digests"]["not-finite"] == alone["digests"]["untouched"]


@pytest.mark.parametrize("case", GROWN)
def test_an_exact_growth_keeps_the_loss_and_the_place_in_the_data(
    case: str, root: Path, alone: dict, together: dict
) -> None:
    _, _, _, tolerance = GROWN[case]
    result = together["results"][case]
    assert alone["results"][f"convert {case}"].code == 0 and result.code == 0, result.text
    parent, child = validation_of(root, case), validation_of(root, case, index=1)
    assert child[0] == pytest.approx(parent[STEPS], abs=tolerance)
    assert child[GROWN_STEPS] < child[0]
    steps = families.steps(file(root, case), 1)
    wanted = [(STEPS + step) * TOKENS_PER_STEP for step in range(1, GROWN_STEPS + 1)]
    assert [record.consumed_tokens for record in steps] == wanted


def test_trackers_receive_the_records_and_keep_their_run_over_a_restart(root: Path, alone: dict) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for case in ("tracked", "restarted"):
        assert alone["results"][case].code == 0, alone["results"][case].text
        board = EventAccumulator(str(place(root, case) / "small" / "tensorboard")).Reload()
        assert {event.step: event.value for event in board.Scalars("validation/loss")} == pytest.approx(
            validation_of(root, case, "llama TP1")
        )
        assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))
    first, second = (wandb_runs(place(root, case)) for case in ("tracked", "restarted"))
    assert len(first) == 1 and len(second) == 2
    assert set(second) == set(first) == {(first[0][0], "tiny", "small")}
    assert_same_bits(root, "restarted", "llama TP1", alone["digests"])


def test_a_tracker_that_fails_does_not_stop_the_training(root: Path, alone: dict) -> None:
    result = alone["results"]["untracked"]
    assert result.code == 0 and result.text.count("Weights & Biases failed") == 1, result.text
    assert_same_bits(root, "untracked", "llama TP1", alone["digests"])


def wandb_runs(save: Path) -> list[tuple[str, str, str]]:
    """(id, group, name) of every offline run of a stage."""
    every = [next(record.run for record in run if is_a(record, "run")) for run in records_of_runs(save / "small")]
    return [(run.run_id, run.run_group, run.display_name) for run in every]
