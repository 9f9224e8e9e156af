"""Trackers over restarts and growth: the real wandb, offline, and TensorBoard. No ranks, no Megatron-Core.

A stage `small` has a run; `large`, grown from it, has one that names it, with its growth at iteration 0; a restart goes
on in the same run. What W&B wrote is read back from its own files. A key in the environment is nowhere on the disk.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory.manifest import Ancestor
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.records import EvalRecord, StepRecord
from megagrow.training.trackers import (
    TensorBoard,
    WeightsAndBiases,
    growth_summary,
    has_wandb_key,
    make_trackers,
    read_run_id,
)
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, WIDER
from tests.distributed.ranks.wandb_files import is_a, records_of_runs

KEY = "0123456789abcdef" * 2 + "deadbeef"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family of two stages, with nothing of W&B in the environment but a key that would be sent nowhere."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    stages = [families.stage("small", LLAMA), families.stage("large", LLAMA | WIDER)]
    file = families.write_family(tmp_path / "save", tmp_path / "text", stages)
    family = load(file, ["trackers.wandb.enabled=true"])
    for index in range(2):
        FamilyPaths(family).stage(index).root.mkdir(parents=True)
    return family


def ancestor(family: Family) -> Ancestor:
    """The growth step from the first stage to the second."""
    return Ancestor(
        path="x", sha256="y", family=family.name, stage="small", iteration=20, shape=family.stages[0].model,
        operators={"hidden": "zero_pad", "layer": "identity"}, moments="asymmetric", noise=0.0,
        options=family.stages[1].growth, seed=1, exact=True, version="0",
    )  # fmt: skip


def step(iteration: int, *, skipped: bool = False) -> StepRecord:
    return StepRecord(
        time=time.time(), stage="s", iteration=iteration, loss=1 / iteration, grad_norm=1.0, learning_rate=1e-3,
        consumed_samples=1, consumed_tokens=8, flops=1.0, tokens_per_second=1.0, skipped=skipped,
    )  # fmt: skip


def validation(iteration: int) -> EvalRecord:
    return EvalRecord(
        time=time.time(), stage="s", iteration=iteration, loss=2.0, samples=4, consumed_tokens=8, flops=0.0
    )


def test_one_group_a_family_one_run_a_stage_and_growth_links_them(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = WeightsAndBiases(family, 0, 0, [])
    parent.on_record(step(1))
    parent.close()
    for iteration in (0, 5):  # started, and started again
        child = WeightsAndBiases(family, 1, iteration, [ancestor(family)])
        for record in [validation(0)] * (iteration == 0) + [step(iteration + 1), step(iteration + 2, skipped=True)]:
            child.on_record(record)
        child.close()
    small, large = (runs(FamilyPaths(family).stage(index).root) for index in range(2))
    assert [(run["group"], run["name"], run["project"]) for run in small + large] == [
        ("tiny", "small", "megagrow"), ("tiny", "large", "megagrow"), ("tiny", "large", "megagrow"),
    ]  # fmt: skip
    ids = [run["id"] for run in small + large]
    assert ids[0] == read_run_id(FamilyPaths(family).stage(0)) != ids[1] == ids[2]
    assert small[0]["config"]["parent_run"] is None and not small[0]["config"]["grown_from"]
    for run in large:
        assert run["config"]["parent_run"] == ids[0] == run["summary"]["growth/parent_run"]
        assert run["summary"]["growth/operators"] == "hidden=zero_pad layer=identity"
    (first, *_), (again, *_) = (run["history"] for run in large)
    assert first["_step"] == 0 and first["growth"] == 1 and first["validation/loss"] == 2.0
    assert again["_step"] == 6 and all("growth" not in line for line in large[1]["history"])
    assert large[0]["history"][-1] == large[0]["history"][-1] | {"_step": 2, "train/skipped": 1}
    written = [path for path in family.save.rglob("*") if path.is_file()]
    assert len(written) > 6 and [path for path in written if KEY.encode() in path.read_bytes()] == []


def runs(root: Path) -> list[dict[str, Any]]:
    """What W&B wrote of each offline run below a directory, oldest first."""
    found = []
    for entries in records_of_runs(root):
        run = next(entry.run for entry in entries if is_a(entry, "run"))
        summary = [item for entry in entries if is_a(entry, "summary") for item in entry.summary.update]
        found.append({
            "id": run.run_id, "group": run.run_group, "name": run.display_name, "project": run.project,
            "config": {item.key: json.loads(item.value_json) for item in run.config.update},
            "summary": plain(summary),
            "history": [plain(entry.history.item) for entry in entries if is_a(entry, "history")],
        })  # fmt: skip
    return found


def plain(items: Any) -> dict[str, Any]:
    """Keys and values of W&B's own."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_the_environment_comes_before_the_family(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"WANDB_PROJECT": "p", "WANDB_RUN_GROUP": "g", "WANDB_NAME": "mine", "WANDB_RUN_ID": "would-merge-all"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    WeightsAndBiases(family, 0, 0, []).close()
    (run,) = runs(FamilyPaths(family).stage(0).root)
    assert (run["project"], run["group"], run["name"]) == ("p", "g", "mine small")
    assert run["id"] == read_run_id(FamilyPaths(family).stage(0)) != "would-merge-all"


def test_without_a_key_there_is_no_network(family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **more: asked.append(more))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in (("WANDB_API_KEY", KEY), ("WANDB_API_KEY", "")):
        monkeypatch.setenv(name, value)
        WeightsAndBiases(family, 0, 0, [])
    assert [more["mode"] for more in asked] == [None, "offline"]


def test_a_key_may_lie_in_a_netrc(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    nothing = {"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example:8080"}
    assert not has_wandb_key(nothing)
    file.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert not has_wandb_key(nothing) and has_wandb_key({"NETRC": str(file)})
    file.write_text(f"machine wandb.example login user password {KEY}\n")
    assert has_wandb_key(nothing)
    file.write_text("machine\n")
    assert not has_wandb_key(nothing)


def test_an_id_that_a_kill_left_empty_is_drawn_anew(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("wandb.init", lambda **more: asked.append(more["id"]))
    paths = FamilyPaths(family).stage(0)
    (paths.root / "wandb_id").write_text("")
    for _ in range(2):
        WeightsAndBiases(family, 0, 0, [])
    assert asked[0] == asked[1] == read_run_id(paths) and len(asked[0]) == 12


def test_tensorboard_goes_on_in_its_directory_and_shows_no_step_twice(family: Family, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    growth = growth_summary([ancestor(family)])
    # killed before anything was saved, killed after the save of iteration 2, and on to the end
    for iteration, received in (
        (0, [validation(0), step(1), step(2)]), (0, [validation(0), step(1), step(2), step(3)]), (2, [step(3), step(4)])
    ):  # fmt: skip
        board = TensorBoard(tmp_path / "board", iteration, growth)
        for record in received:
            board.on_record(record)
        board.close()
        time.sleep(1.1)  # TensorBoard orders files by the second that is in their names
    seen = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in seen.Scalars("validation/loss")] == [0]
    texts = seen.Tensors("growth/text_summary")  # which TensorBoard does not purge: the same one twice
    assert {(text.step, b"hidden=zero_pad" in text.tensor_proto.string_val[0]) for text in texts} == {(0, True)}


def test_nothing_is_tracked_that_was_not_asked_for(family: Family) -> None:
    plain_family = family.model_copy(update={"trackers": type(family.trackers)()})
    assert make_trackers(plain_family, 0, 0, []) == [] and growth_summary([]) == {}
