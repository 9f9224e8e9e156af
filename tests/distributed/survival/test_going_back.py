"""Training goes back behind existing checkpoints, on to the same bits, and keeps its old future aside.

One start of one rank runs all cases: the tracker set back by hand (and a stop one step later), damage of the newest
checkpoint, a kill before the tracker was written, a roll back, and a checkpoint that appears while it trains.
"""

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megagrow.checkpoint.directory import iterations
from megagrow.config import load
from megagrow.slurm_step import JOB_END_TIME
from megagrow.tracker import TRACKER
from tests.distributed.ranks import families
from tests.distributed.ranks.families import BATCH, LLAMA, TOKENS_PER_STEP, Said, verb
from tests.distributed.ranks.launcher import run_ranks
from tests.distributed.survival.test_survival import poison
from tools.proofs import kill_test

pytestmark = pytest.mark.timeout(600)
STEPS, EVERY = 10, 2
KEEP_ONE = "checkpoint.keep=1"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of all cases: the family.yaml, and a directory per case."""
    directory = tmp_path_factory.mktemp("back")
    text = families.write_text(directory / "text.jsonl", 100)
    one = families.stage("small", LLAMA | {"num_layers": 2}, train_tokens=STEPS * TOKENS_PER_STEP)
    saves = {"save_interval": EVERY, "keep": 9}
    families.write_family(directory / "short", text, [one], checkpoint=saves, evaluation={"eval_samples": 8})
    return directory


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list[Said]]:
    """Results of all cases, from one start."""
    found: dict[str, list[Said]] = run_ranks("tests.distributed.survival.test_going_back:work", 1, root)[0]
    return found


def work(root: Path) -> dict[str, list[Said]]:
    """Every case, each in a copy of the undisturbed directory."""
    assert verb("data", root / "short.yaml", f"save={root}").code == 0
    results = {"quiet": [train(root, "quiet")]}

    save = copy(root, "by hand", STEPS)
    iterations.write_tracker(save, 4)
    with mock.patch.dict(os.environ, {JOB_END_TIME: str(int(time.time()))}):
        results["by hand"] = [train(root, "by hand", KEEP_ONE)]
    results["by hand"].append(train(root, "by hand", KEEP_ONE))

    save = copy(root, "damage", STEPS)
    iterations.write_tracker(save, 8)
    (iterations.iteration_path(save, 8) / ".metadata").unlink()
    results["damage"] = [train(root, "damage", KEEP_ONE)]

    save = copy(root, "killed at the first save", EVERY)
    (save / TRACKER).unlink()
    results["killed at the first save"] = [train(root, "killed at the first save")]

    save = copy(root, "roll back", STEPS)
    iterations.write_tracker(save, 4)
    with poison(root, [7 * BATCH - 1]):
        results["roll back"] = [train(root, "roll back", KEEP_ONE, "training.non_finite=roll_back")]

    copy(root, "refused", STEPS)
    iterations.write_tracker(place(root, "refused"), 4)
    results["refused"] = [train(root, "refused", "stages.0.schedule.max_lr=1e-4")]

    save = copy(root, "appears", 4)
    with appearing(save, 6):
        results["appears"] = [train(root, "appears")]
    return results


def place(root: Path, case: str) -> Path:
    """Directory of a case's checkpoints."""
    return root / case.replace(" ", "-") / "small" / "checkpoints"


def copy(root: Path, case: str, iteration: int) -> Path:
    """Copy the undisturbed stage as it was at an iteration; return the directory of checkpoints."""
    families.rewind(root / "quiet", root / case.replace(" ", "-"), "small", iteration)
    return place(root, case)


def train(root: Path, case: str, *overrides: str) -> Said:
    """Train in the directory of a case."""
    save = place(root, case).parents[1]
    if not (save / "data").exists():
        families.lend(root / "data", save)
    return verb("train", root / "short.yaml", "--stage", "small", f"save={save}", *overrides)


def appearing(save: Path, iteration: int) -> Any:
    """Somebody puts a directory of this name there while the run is at work."""
    new = iterations.new_staging

    def staging(final: Path) -> Path:
        if final == iterations.iteration_path(save, iteration):
            final.mkdir()
            (final / "somebody's").touch()
        return new(final)

    return mock.patch.object(iterations, "new_staging", staging)


def digest(root: Path, case: str, iteration: int = STEPS, *, aside: bool = False) -> str:
    """Digest of a checkpoint of a case."""
    save = place(root, case)
    return kill_test.digest(iterations.iteration_path(save / "ahead" if aside else save, iteration))


def story(root: Path, case: str) -> list[tuple[int, float, int]]:
    """Recorded steps of a case."""
    taken = families.steps(load(root / "short.yaml", [f"save={place(root, case).parents[1]}"]))
    return [(step.iteration, step.loss, step.consumed_samples) for step in taken]


# issue 12: D16
def test_a_stage_whose_tracker_is_set_back_trains_to_the_same_bits_and_keeps_its_old_future(
    root: Path, results: dict[str, list[Said]]
) -> None:
    stopped, resumed = results["by hand"]
    assert stopped.code == 0 and "after iteration 5; saved" in stopped.text, stopped.text
    assert "iterations [6, 8, 10] were ahead of iteration 4, from which training goes on" in stopped.text
    assert resumed.code == 0, resumed.text
    assert digest(root, "by hand") == digest(root, "quiet") and story(root, "by hand") == story(root, "quiet")
    assert iterations.published(place(root, "by hand")) == [STEPS]
    assert iterations.published(place(root, "by hand") / "ahead") == [6, 8, 10]
    for number in (6, 8, 10):
        assert digest(root, "by hand", number, aside=True) == digest(root, "quiet", number)


# issue 12: D16
def test_damage_of_the_newest_goes_back_and_what_is_ahead_is_kept(root: Path, results: dict[str, list[Said]]) -> None:
    (result,) = results["damage"]
    assert result.code == 0 and "named 8, and is set to 6" in result.text, result.text
    assert digest(root, "damage") == digest(root, "quiet") and story(root, "damage") == story(root, "quiet")
    names = {entry.name for entry in place(root, "damage").iterdir()}
    assert names == {"ahead", "iter_0000008.refused", "iter_0000010", TRACKER}
    assert digest(root, "damage", STEPS, aside=True) == digest(root, "quiet")


# issue 12: D16
def test_a_kill_between_the_first_publication_and_its_tracker_needs_no_hand(
    root: Path, results: dict[str, list[Said]]
) -> None:
    (result,) = results["killed at the first save"]
    assert result.code == 0, result.text
    assert digest(root, "killed at the first save") == digest(root, "quiet")


# issue 12: D16
def test_a_roll_back_after_a_going_back_removes_nothing_that_was_ahead(
    root: Path, results: dict[str, list[Said]]
) -> None:
    (result,) = results["roll back"]
    assert result.code == 0 and "at iteration 7: rolling back to iteration 6" in result.text, result.text
    assert digest(root, "roll back") != digest(root, "quiet")
    assert iterations.published(place(root, "roll back") / "ahead") == [6, 8, 10]
    assert digest(root, "roll back", STEPS, aside=True) == digest(root, "quiet")


# issue 12: D16
def test_a_refused_start_renames_nothing(root: Path, results: dict[str, list[Said]]) -> None:
    (result,) = results["refused"]
    assert result.code == 2 and "was trained with max_lr=0.003, not 0.0001" in result.text, result.text
    assert iterations.published(place(root, "refused")) == [2, 4, 6, 8, 10]
    assert iterations.read_tracker(place(root, "refused")) == 4


# issue 12: D16
def test_what_appears_where_a_run_saves_is_not_overwritten(root: Path, results: dict[str, list[Said]]) -> None:
    (result,) = results["appears"]
    assert result.code == 0, result.text
    assert digest(root, "appears") == digest(root, "quiet")
    assert (place(root, "appears") / "ahead" / "iter_0000006" / "somebody's").exists()
