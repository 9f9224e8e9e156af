"""What is ahead of the tracker is set aside and kept; retention counts only what the tracker has passed.

The checkpoints here are the smallest that pass the checks: marker files, and a name by which a test knows each again.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.directory import iterations, recovery
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER

NUMBERS = st.sets(st.integers(0, 6), max_size=6)
EXAMPLES = settings(max_examples=150, deadline=None)


def add(save: Path, number: int, name: str = "") -> Path:
    """Publish a whole checkpoint that knows its name."""
    path = iterations.iteration_path(save, number)
    path.mkdir(parents=True)
    for file in (".metadata", "common.pt"):
        (path / file).touch()
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (path / "name").write_text(name or f"first {number}")
    return path


@contextmanager
def stage(published: set[int], tracker: int | None, damaged: frozenset[int] | set[int] = frozenset()) -> Iterator[Path]:
    """A directory of checkpoints."""
    with tempfile.TemporaryDirectory() as place:
        save = Path(place) / "checkpoints"
        save.mkdir()
        for number in published:
            add(save, number)
        for number in published & damaged:
            (iterations.iteration_path(save, number) / ".metadata").unlink()
        if tracker is not None:
            iterations.write_tracker(save, tracker)
        yield save


def known(save: Path) -> dict[int, str]:
    """The names of the checkpoints in a directory, by iteration."""
    return {number: (iterations.iteration_path(save, number) / "name").read_text() for number in
            iterations.published(save)}  # fmt: skip


def start(save: Path) -> int:
    """What the start of a training does with its directory; the iteration that it starts from."""
    iterations.sweep(save)
    path = recovery.newest_whole(save)
    assert path is not None
    number = int(path.name.removeprefix("iter_"))
    recovery.go_back(save, number)
    return number


def save_at(save: Path, number: int, keep: int) -> None:
    """What a save does."""
    path = iterations.iteration_path(save, number)
    assert not path.exists(), "a start leaves nothing where this run saves"
    add(save, number, f"second {number}")
    iterations.write_tracker(save, number)
    iterations.retain(save, keep)


# issue 12: D16
@EXAMPLES
@given(published=NUMBERS, tracker=st.integers(0, 7), keep=st.integers(1, 4))
def test_retention_counts_only_what_the_tracker_has_passed(published: set[int], tracker: int, keep: int) -> None:
    with stage(published, tracker) as save:
        iterations.retain(save, keep)
        passed = sorted(number for number in published if number <= tracker)
        assert set(iterations.published(save)) == {n for n in published if n > tracker} | set(passed[-keep:])
        assert tracker not in published or tracker in iterations.published(save)


# issue 12: D16
def test_retention_without_a_tracker_removes_nothing() -> None:
    with stage({1, 2, 3}, None) as save:
        with pytest.raises(CheckpointError, match="has iterations .* but no"):
            iterations.retain(save, 1)
        assert iterations.published(save) == [1, 2, 3]


# issue 12: D16
@EXAMPLES
@given(published=NUMBERS, tracker=st.integers(0, 7), damaged=NUMBERS, keep=st.integers(1, 3))
def test_what_is_ahead_is_kept_aside_and_never_used(
    published: set[int], tracker: int, damaged: set[int], keep: int
) -> None:
    """In every combination of tracker, iterations and damage, until the stage has passed its old future."""
    ahead = {number: f"first {number}" for number in published if number > tracker}
    whole = sorted(number for number in published - damaged if number <= tracker)
    with stage(published, tracker, damaged) as save:
        if not whole:
            if published or tracker:
                with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
                    start(save)
            assert {n: name for n, name in known(save).items() if n > tracker} == ahead, "a refused start moves nothing"
            return
        assert start(save) == whole[-1] == iterations.read_tracker(save) == iterations.published(save)[-1]
        assert known(save / "ahead") == ahead
        for number in range(whole[-1] + 1, 9):
            save_at(save, number, keep)
            assert iterations.read_tracker(save) == number == start(save)
            assert known(save)[number] == f"second {number}" and len(known(save)) <= keep
        assert known(save / "ahead") == ahead, "neither a save nor a later start touches it"


# issue 12: D16
def test_one_set_is_kept_and_a_later_going_back_replaces_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("megagrow").propagate = True  # the command line may have turned it off in this process
    with stage({1, 2, 3, 4}, 2) as save, caplog.at_level(logging.WARNING, "megagrow"):
        assert start(save) == 2 and known(save / "ahead") == {3: "first 3", 4: "first 4"}
        assert "iterations [3, 4] were ahead of iteration 2" in caplog.text and "removed" not in caplog.text
        save_at(save, 3, keep=5)
        iterations.write_tracker(save, 1)
        assert start(save) == 1 and known(save / "ahead") == {2: "first 2", 3: "second 3"}
        assert "where older ones are removed" in caplog.text
        assert sorted(entry.name for entry in save.iterdir()) == ["ahead", "iter_0000001", TRACKER]
        # back to the old future, as docs/checkpoints.md says
        for path in (save / "ahead").iterdir():
            path.rename(save / path.name)
        iterations.write_tracker(save, 3)
        assert start(save) == 3 and known(save) == {1: "first 1", 2: "first 2", 3: "second 3"}


# issue 12: D16
def test_damage_behind_the_tracker_moves_the_tracker_too() -> None:
    with stage({1, 2, 3, 4}, 3, {3}) as save:
        assert start(save) == 2 == iterations.read_tracker(save) and known(save / "ahead") == {4: "first 4"}
        assert (save / "iter_0000003.refused").is_dir()


# issue 12: D16
@pytest.mark.parametrize("older", [False, True])
def test_a_going_back_killed_at_any_step_is_completed_by_the_next_start(older: bool) -> None:
    steps = 0
    while True:
        with stage({1, 2, 3, 4, 5}, 2) as save:
            if older:
                add(save / "ahead", 9, "old")
            if not killed_at(steps, save):
                break
            everything = {name for place in (save, save / "ahead", save / ".ahead.moving") for name in
                          known(place).values()}  # fmt: skip
            assert everything >= {f"first {number}" for number in range(1, 6)}, "a kill loses nothing"
            assert start(save) == 2 and known(save) == {1: "first 1", 2: "first 2"}
            assert known(save / "ahead") == {number: f"first {number}" for number in (3, 4, 5)}
            assert sorted(entry.name for entry in save.iterdir()) == ["ahead", "iter_0000001", "iter_0000002", TRACKER]
        steps += 1
    assert steps == 4 + 2 * older


def killed_at(step: int, save: Path) -> bool:
    """Start, and be killed before the n-th rename or removal; False if there are fewer."""
    taken = 0

    def counted(right):  # type: ignore[no-untyped-def]  # of any function
        def act(*arguments, **options):  # type: ignore[no-untyped-def]  # of any function
            nonlocal taken
            if str(save) in str(arguments[0]) and Path(arguments[0]).exists():
                taken += 1
                if taken == step + 1:
                    raise KeyboardInterrupt
            return right(*arguments, **options)

        return act

    with (
        mock.patch.object(os, "rename", counted(os.rename)),
        mock.patch.object(shutil, "rmtree", counted(shutil.rmtree)),
    ):
        try:
            start(save)
        except KeyboardInterrupt:
            return True
    return False


# issue 12: D16
def test_a_kill_before_the_first_tracker_needs_no_hand() -> None:
    with stage({5}, None) as save:
        assert start(save) == 5 == iterations.read_tracker(save)
    with stage({5, 6}, None) as save, pytest.raises(CheckpointError, match="has iterations .* but no"):
        start(save)


# issue 12: D16
def test_without_a_whole_one_behind_it_the_tracker_may_be_set_forward() -> None:
    with stage({4, 5}, 3) as save:
        with pytest.raises(CheckpointError, match=r"names 3, but no .*; restore one from a backup, or write one of "):
            start(save)
        assert iterations.published(save) == [4, 5] and not (save / "ahead").exists()


# issue 12: D16
def test_another_spelling_of_a_number_is_no_iteration() -> None:
    with stage({1, 2}, 1) as save:
        (save / "iter_00000002").mkdir()
        (save / "iter_0000002").rename(save / "iter_0000003")
        assert iterations.published(save) == [1, 3] and start(save) == 1 and iterations.published(save) == [1]
        assert (save / "iter_00000002").is_dir()
