"""Whether a stage is grown, running or waiting, as `report` and `status` tell it: by its files and its locks."""

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.reference.command import megagrow
from tests.unit.family.test_config import TREE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A family of two stages, of 10 steps and more."""
    tree = {**TREE, "save": str(tmp_path / "save"), "budget": {"tokens_per_parameter": 1}}
    tree["stages"] = [{"name": "small", "train_tokens": 1280}, {"name": "large", "model": {"hidden_size": 24}}]
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "family.yaml"


def append(path: Path, **record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps({"time": time.time(), **record}) + "\n")


def trained(file: Path, steps: int) -> Path:
    """The directory of `small` after some steps, with a checkpoint after the third; an old one, without a manifest."""
    place = file.parent / "save" / "small"
    for step in range(1, steps + 1):
        append(
            place / "records.jsonl", kind="step", stage="small", iteration=step, loss=1.0, grad_norm=1.0,
            learning_rate=1.0, consumed_samples=step, consumed_tokens=step, flops=1.0, tokens_per_second=100.0,
        )  # fmt: skip
    (place / "checkpoints" / "iter_0000003").mkdir(parents=True)
    (place / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    return place


def status(file: Path) -> dict[str, dict[str, Any]]:
    done = megagrow("status", file, "--json", PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    return {row["job"]: row for row in json.loads(done.stdout)["rows"]}


# issue 12: D17
def test_a_directory_with_the_name_of_a_stage_grows_nothing(file: Path, tmp_path: Path) -> None:
    save = tmp_path / "large" / "save"
    tree = yaml.safe_load(file.read_text())
    tree["stages"].append({"name": "larger", "model": {"hidden_size": 32}})
    file.write_text(yaml.safe_dump(tree))
    append(
        save / "records.jsonl", kind="conversion", source=f"{save}/large/checkpoints/iter_0000007",
        target=f"{save}/larger/checkpoints/iter_0000000", operators={"hidden": "zero_pad"}, moments="exact",
        exact=True, tensors=1, bytes_read=1, bytes_written=1, seconds=1.0,
    )  # fmt: skip
    done = megagrow("report", file, f"save={save}", "--json")
    assert done.returncode == 0, done.stderr
    states = {row["name"]: row["state"] for row in json.loads(done.stdout)["rows"][:3]}
    assert states == {"small": "waiting", "large": "waiting", "larger": "grown"}


# issue 12: D17
def test_a_dead_run_is_not_running_and_has_no_rate(file: Path) -> None:
    trained(file, 5)
    append(file.parent / "save" / "records.jsonl", kind="job", job="train-small", event="started")
    row = status(file)["train-small"]
    assert row["state"] == "stopped" and row["why"] == "`megagrow run` resumes it"
    assert row["tokens_per_second"] is None and row["ends"] is None and row["checkpoint"] == 3


# issue 12: D17
def test_a_lock_shows_that_a_stage_is_trained_by_hand(file: Path) -> None:
    place = trained(file, 5)
    with open(place / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        row = status(file)["train-small"]
    assert row["state"] == "running" and row["tokens_per_second"] == 100 and row["ends"] is not None


# issue 12: D17
def test_a_run_at_work_holds_its_lock(file: Path) -> None:
    append(file.parent / "save" / "records.jsonl", kind="job", job="data", event="started")
    assert status(file)["data"]["state"] == "stopped"
    with open(file.parent / "save" / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert status(file)["data"]["state"] == "running"


# issue 12: D17
def test_a_stage_that_was_trained_by_hand_does_not_wait_for_data(file: Path) -> None:
    trained(file, 3)
    data = file.parent / "save" / "data"
    data.mkdir()
    (data / "prepared.json").write_text("{}")
    rows = status(file)
    assert rows["data"]["state"] == "finished"
    assert rows["train-small"]["state"] == "stopped" and rows["train-small"]["why"].startswith("at iteration 3: ")
    assert rows["convert-large"]["why"] == "for train-small"
