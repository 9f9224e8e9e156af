"""Conversions that are killed at any step, refused, or out of space produce the same bytes or nothing."""

import errno
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory import integrity, iterations
from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.run import TargetSpec
from megagrow.convert.work.disk import OutputStream
from megagrow.convert.work.journal import DIRECTORY, FINISH, Journal
from megagrow.convert.work.rank import WorkerRank
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER
from tests.reference.conversions import (
    WORKER_RANK,
    assert_like,
    assert_published,
    convert,
    cut_small,
    ended,
    files_of,
    forked,
    small_source,
    target,
)
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}
RENAMES = {"os.rename"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


# Kills


def killed_at(step: int, source: Path, save: Path, steps: Set[str] = STEPS, **options: Any) -> bool:
    """Convert in a process that is killed before its n-th step of some kinds; False if it takes fewer steps."""

    def work() -> None:
        taken = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal taken
            if event in steps and str(save) in str(arguments[:2]):
                taken += 1
                if taken == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        convert(source, save, **options)
        (source.parent / "steps").write_text(str(taken))

    code = ended(forked(work))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def steps_of(source: Path, save: Path, steps: Set[str] = STEPS, **options: Any) -> int:
    """Number of steps of a conversion; it varies a little, since workers report their progress every second."""
    assert not killed_at(-1, source, save, steps, **options)
    return int((source.parent / "steps").read_text())


def test_a_conversion_killed_before_any_step_is_resumed_to_the_same_bytes(
    source: Path, tmp_path: Path, many_units: None
) -> None:
    undisturbed = files_of(convert(source, tmp_path / "undisturbed"))
    last = steps_of(source, tmp_path / "steps")
    kept = 0
    # some steps while units are made; every step of finishing, publishing and the tracker
    for step in (*range(1, last - 20, last // 8), *range(last - 20, last + 1)):
        save = tmp_path / str(step)
        killed_at(step, source, save)
        final, staging = save / "iter_0000000", save / ".iter_0000000.converting"
        if final.exists():
            integrity.check(final)
        elif not (staging / "metadata.json").exists():
            with pytest.raises(CheckpointError):
                open_checkpoint(staging)
        assert iterations.published(save) == ([0] if final.exists() else []), step
        marks = sorted((staging / DIRECTORY).glob("unit-*.done"))
        names = [name for mark in marks for name in json.loads(mark.read_text())]
        before = {name: (staging / name).stat().st_mtime_ns for name in names}
        kept += len(marks)
        assert_published(convert(source, save), undisturbed)
        assert before == {name: (final / name).stat().st_mtime_ns for name in names}, "a finished unit is made again"
    assert kept > 30, "these kills come while units are being finished"


def test_an_old_target_is_whole_until_the_new_one_is(source: Path, tmp_path: Path, many_units: None) -> None:
    new = files_of(convert(source, tmp_path / "new"))
    old = files_of(convert(source, tmp_path / "old", target(seed=8)))
    assert old != new
    convert(source, tmp_path / "steps", target(seed=8))
    last = steps_of(source, tmp_path / "steps", RENAMES, overwrite=True)
    seen = []
    # the last four renames: old target away, new target in place, its journal away, the tracker
    for step in (1, last // 2, last - 3, last - 2, last - 1, last):
        save = tmp_path / str(step)
        final = convert(source, save, target(seed=8))
        assert killed_at(step, source, save, RENAMES, overwrite=True)
        if final.exists():
            which = "old" if files_of(final) == old else "new"
            assert_like(final, {"old": old, "new": new}[which])
        else:  # between the two renames: the new target is whole, and the old one is not yet removed
            which = "between"
            integrity.check(save / ".iter_0000000.converting")
            integrity.check(next(save.glob(".iter_0000000.staging-*")))
        seen.append(which)
        assert_published(convert(source, save, overwrite=True), new)
    assert seen == ["old", "old", "old", "between", "new", "new"]


def test_an_old_target_is_not_touched_without_overwrite(source: Path, tmp_path: Path) -> None:
    final = convert(source, tmp_path / "large", target(seed=8))
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in final.iterdir()}
    with pytest.raises(
        CheckpointError, match=r"another checkpoint already exists here; it is not touched \(--overwrite replaces"
    ):
        convert(source, tmp_path / "large")
    assert before == {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in final.iterdir()}
    new = files_of(convert(source, tmp_path / "large", overwrite=True))
    assert new == files_of(convert(source, tmp_path / "alone"))


# Conversions that must not be resumed


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, save: Path, wanted: TargetSpec | None = None) -> Path:
    """Convert, stop after some units, and return the staging directory."""
    finish, finished = Journal.finish_unit, 0

    def stop(self: Journal, unit: int, written: dict[str, Any]) -> None:
        nonlocal finished
        finish(self, unit, written)
        finished += 1
        if finished == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish_unit", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, save, wanted)
    staging = save / ".iter_0000000.converting"
    assert len(Journal(staging).finished_units()) >= 3
    return staging


def test_a_changed_plan_is_refused(
    source: Path, tmp_path: Path, many_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = interrupt(monkeypatch, source, tmp_path / "large")
    gc.collect()  # flushes what the interrupted streams still had in their buffers, which moves a time
    time.sleep(0.5)
    before = {file: file.stat().st_mtime_ns for file in staging.iterdir() if file.is_file()}
    for other, message in (
        (target(seed=8), r"differs in order\.seed \(7, now 8\)"),
        (target(layout=ParallelLayout()), r"order\.layout\.tensor_model_parallel_size \(2, now 1\)"),
        (target(growth=GrowthConfig(noise=0.1)), r"order\.growth\.hidden \('balanced', now 'zero_pad'\)"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(source, tmp_path / "large", other)
        assert "--restart to throw away" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"differs in order\.sha256"):
        convert(source, tmp_path / "large", sha256=True)
    assert before == {file: file.stat().st_mtime_ns for file in staging.iterdir() if file.is_file()}
    restarted = convert(source, tmp_path / "large", target(seed=8), restart=True)
    assert_published(restarted, files_of(convert(source, tmp_path / "undisturbed", target(seed=8))))


def test_a_refusal_keeps_what_another_process_has_just_started(source: Path, tmp_path: Path) -> None:
    staging = tmp_path / "large" / ".iter_0000000.converting"
    Journal(staging).begin({"order": {"seed": 8}})
    with pytest.raises(CheckpointError, match="differs in order"):
        convert(source, tmp_path / "large")
    assert Journal(staging).plan() == {"order": {"seed": 8}}


def test_a_changed_source_is_refused(
    source: Path, tmp_path: Path, many_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write_checkpoint(tmp_path / "small", shape(SMALL), random_state(shape(SMALL)))
    interrupt(monkeypatch, mine, tmp_path / "large")
    with open(mine / "__0_0.distcp", "r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff")
    integrity.seal(mine)
    with pytest.raises(CheckpointError, match=r"changed while it was converted \(__0_0\.distcp, integrity\.json\)"):
        convert(mine, tmp_path / "large")
    assert not (tmp_path / "large" / "iter_0000000").exists()


@pytest.mark.parametrize("when", ["while units are made", "before the finish"])
def test_a_change_of_the_source_during_the_conversion_is_noticed(
    source: Path, tmp_path: Path, many_units: None, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    mine = write_checkpoint(tmp_path / "small", shape(SMALL), random_state(shape(SMALL)))
    finish, claim = Journal.finish_unit, Journal.claim

    def touch() -> None:
        os.utime(mine / "__0_0.distcp")

    def finished(self: Journal, unit: int, written: dict[str, Any]) -> None:
        finish(self, unit, written)
        touch()

    def claimed(self: Journal, name: str) -> bool:
        if name == FINISH:
            touch()
        return claim(self, name)

    if when == "before the finish":
        monkeypatch.setattr(Journal, "claim", claimed)
    else:
        monkeypatch.setattr(Journal, "finish_unit", finished)
    with pytest.raises(
        CheckpointError, match=r"changed while it was converted \(__0_0\.distcp\); nothing was published"
    ):
        convert(mine, tmp_path / "large")
    assert iterations.published(tmp_path / "large") == [] and not (tmp_path / "large" / TRACKER).exists()


def test_files_missing_from_the_staging_directory_are_noticed(
    source: Path, tmp_path: Path, many_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = interrupt(monkeypatch, source, tmp_path / "large")
    gone = next(iter(next(iter(Journal(staging).finished().values()))))
    (staging / gone).unlink()
    with pytest.raises(CheckpointError, match=rf"{gone}: missing, \d+ bytes were written; --restart starts again"):
        convert(source, tmp_path / "large")
    assert iterations.published(tmp_path / "large") == []


# Memory and disk space


def test_too_little_memory_is_refused_with_the_amount_needed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--memory 32MiB is too little for 3 workers, which need [\d,]+MiB"):
        convert(source, tmp_path / "large", workers=3, memory=32 << 20)
    assert not (tmp_path / "large" / "iter_0000000").exists()


def test_too_little_space_is_noticed_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs_result((4096, 4096, 100, 2, 2, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(CheckpointError, match=r"the disk is full: 0\.\d\d GB are needed, 0\.00 GB are free"):
        convert(source, tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_a_full_disk_leaves_nothing_unless_other_ranks_are_at_work(
    source: Path, tmp_path: Path, many_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, closed = OutputStream.close, 0

    def full(self: OutputStream) -> dict[str, Any]:
        nonlocal closed
        closed += 1
        if closed > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return close(self)

    monkeypatch.setattr(OutputStream, "close", full)
    with pytest.raises(CheckpointError, match="the disk is full; nothing of the new checkpoint is kept"):
        convert(source, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    monkeypatch.setattr(WORKER_RANK, lambda: WorkerRank(0, 2, 2))
    closed = 0
    with pytest.raises(CheckpointError, match="the disk is full; make room, and run the same command again"):
        convert(source, tmp_path / "ranks")
    assert Journal(tmp_path / "ranks" / ".iter_0000000.converting").finished_units()
