"""A source that is written to during a conversion, a target that a kill left untracked, and a disk that is full."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory import iterations
from megagrow.config import GrowthConfig
from megagrow.convert.plan import changed_files, file_states
from megagrow.convert.run import TargetSpec
from megagrow.convert.work import execute
from megagrow.convert.work.journal import DIRECTORY, FINISH, Journal
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER
from tests.distributed.ranks.families import verb
from tests.reference.conversions import assert_published, convert, cut_small, files_of, small_source, target
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_source(tmp_path / "small")


# issue 12: D16
def test_a_conversion_killed_before_it_moved_the_tracker_moves_it_when_it_is_repeated(
    source: Path, tmp_path: Path
) -> None:
    """A reshard keeps its iteration, here 10, and the target's directory has an older one."""
    save, reshard = tmp_path / "same", target(shape(SMALL), stage="same", growth=GrowthConfig())
    write_checkpoint(save, shape(SMALL), random_state(shape(SMALL)), iteration=5)
    convert(source, save, reshard)
    assert iterations.read_tracker(save) == 10 and iterations.published(save) == [5, 10]
    iterations.write_tracker(save, 5)  # as the kill leaves it
    convert(source, save, reshard)
    assert iterations.read_tracker(save) == 10


# A source that changes, and its modification times do not show it


def rewrite_in_place(file: Path) -> None:
    """Change a byte; size, inode and modification time stay."""
    before = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-9, os.SEEK_END)
        stream.write(b"\xff")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_with_times(file: Path) -> None:
    """Put another file of the same size and modification time in its place, as `rsync --times` does."""
    other = file.with_name("other")
    shutil.copy2(file, other)
    os.replace(other, file)


def at(moment: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Let something happen at a moment of a conversion."""
    claim, finish, begin, pending = Journal.claim, Journal.finish_unit, Journal.begin, [change]

    def now() -> None:
        if pending:
            pending.pop()()

    def claimed(self: Journal, name: str) -> bool:
        if name == FINISH:
            now()
        return claim(self, name)

    def finished(self: Journal, *arguments: Any) -> None:
        finish(self, *arguments)
        now()

    def begun(self: Journal, *arguments: Any) -> bool:
        now()
        return begin(self, *arguments)

    patched = {"after the check": ("begin", begun), "while units are made": ("finish_unit", finished)}
    monkeypatch.setattr(Journal, *patched.get(moment, ("claim", claimed)))


# issue 12: C14
@pytest.mark.parametrize("moment", ["after the check", "while units are made", "before the finish"])
@pytest.mark.parametrize("change", [rewrite_in_place, replace_with_times])
@pytest.mark.parametrize("to", ["torch_dist", "huggingface"])
def test_a_source_that_changes_with_its_times_restored_is_noticed(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    moment: str,
    to: str,
) -> None:
    cut_small(monkeypatch)
    file = source / "__0_0.distcp"
    before = file.stat()
    at(moment, monkeypatch, lambda: change(file))
    said = verb("convert", source, tmp_path / "target", "--to", to, "--memory", "4g")
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    noticed = ("changed while it was converted (__0_0.distcp)", "are not those that were written")  # by either check
    assert said.code == 2 and any(words in said.text for words in noticed), said.text
    assert "Traceback" not in said.text
    assert not (tmp_path / "target" / "iter_0000010").exists() and not (tmp_path / "target" / "config.json").exists()


# issue 12: C14
def test_a_source_that_is_replaced_between_two_runs_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("integrity.json", "megagrow.json"):
        (source / name).unlink()  # no checksum shows the change
    wanted = target(source_shape=shape(SMALL))
    interrupt(monkeypatch, source, tmp_path / "large", wanted)
    rewrite_in_place(source / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"changed while it was converted \(__0_0\.distcp\)"):
        convert(source, tmp_path / "large", wanted)
    assert iterations.published(tmp_path / "large") == []


# issue 12: C14
def test_a_source_that_is_only_read_is_never_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    undisturbed = files_of(convert(source, tmp_path / "undisturbed"))
    interrupt(monkeypatch, source, tmp_path / "large")
    for file in source.iterdir():
        file.read_bytes()
    assert_published(convert(source, tmp_path / "large"), undisturbed)


# issue 12: C14
def test_a_conversion_begun_by_an_older_version_is_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It recorded size and modification time as a text, and its order lacked settings that are at their defaults."""
    cut_small(monkeypatch)
    undisturbed = files_of(convert(source, tmp_path / "undisturbed"))
    for save in (tmp_path / "large", tmp_path / "changed"):
        file = interrupt(monkeypatch, source, save) / DIRECTORY / "plan.json"
        plan = json.loads(file.read_text())
        assert set(plan["source files"]) == {entry.name for entry in source.iterdir()}
        plan["source files"] = {
            name: f"{state['size']} bytes at {state['modified']}" for name, state in plan["source files"].items()
        }
        del plan["order"]["tokenizer"], plan["order"]["optimizer"]
        file.write_text(json.dumps(plan))
    assert_published(convert(source, tmp_path / "large"), undisturbed)
    os.utime(source / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"changed while it was converted \(__0_0\.distcp\)"):
        convert(source, tmp_path / "changed")


# issue 12: C14
def test_inodes_are_compared_on_one_device_of_one_machine_only(source: Path) -> None:
    now = file_states(source)
    other_inode = {name: {**state, "inode": -1} for name, state in now.items()}
    elsewhere = {name: {**state, "device": "other:1"} for name, state in other_inode.items()}
    assert changed_files(now, now) == changed_files(elsewhere, now) == []
    assert changed_files(other_inode, now) == sorted(now)
    assert changed_files({}, now) == changed_files(now, {}) == sorted(now)
    assert changed_files(dict.fromkeys(now, "damaged"), now) == sorted(now)


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, save: Path, wanted: TargetSpec | None = None) -> Path:
    """Interrupt a conversion after three units; return its staging directory."""
    finish, units = Journal.finish_unit, 0

    def finished(self: Journal, *arguments: Any) -> None:
        nonlocal units
        finish(self, *arguments)
        units += 1
        if units == 3:
            raise KeyboardInterrupt

    cut_small(monkeypatch)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "finish_unit", finished)
        convert(source, save, wanted)
    return iterations.conversion_staging(save / "iter_0000000")


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


# issue 12: C14
@pytest.mark.parametrize("filled_by", ["the target", "someone else"])
@pytest.mark.parametrize("to", ["torch_dist", "huggingface", "legacy"])
def test_a_full_disk_leaves_nothing_behind(
    source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, to: str, filled_by: str
) -> None:
    if filled_by == "someone else":  # after the free space was counted
        monkeypatch.setattr(execute, "check_space", lambda directory, needed: None)
    said = verb("convert", source, small_disk / "new" / "h", "--to", to, "--memory", "4g")
    assert said.code == 2 and "the disk is full" in said.text and "Traceback" not in said.text, said.text
    assert not list(small_disk.iterdir())


# issue 12: C14
def test_a_full_disk_leaves_a_directory_that_was_there(source: Path, small_disk: Path) -> None:
    (small_disk / "h").mkdir()
    assert verb("convert", source, small_disk / "h", "--memory", "4g").code == 2
    assert [entry.name for entry in small_disk.iterdir()] == ["h"] and not list((small_disk / "h").iterdir())


# issue 12: C14
def test_a_target_without_room_for_its_tracker_is_not_said_to_be_gone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(save: Path, iteration: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(iterations, "write_tracker", full)
        with pytest.raises(CheckpointError, match=r"iter_0000000: is complete, but latest_.* No space left on device"):
            convert(source, tmp_path / "large")
    convert(source, tmp_path / "large")
    assert iterations.read_tracker(tmp_path / "large") == 0


# issue 12: D16
def test_a_legacy_export_killed_before_its_tracker_gets_one(source: Path, tmp_path: Path) -> None:
    line = ("convert", source, tmp_path / "old", "--to", "legacy", "--memory", "4g")
    assert verb(*line).code == 0
    (tmp_path / "old" / TRACKER).unlink()
    said = verb(*line)
    assert said.code == 2 and "already exists" in said.text and iterations.read_tracker(tmp_path / "old") == 10
