"""Read-ahead fills the kernel's cache with the source, and with no more of it than intended."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megagrow.convert.early import readahead
from megagrow.convert.early.readahead import Readahead

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 3 * readahead._STEP // PAGE


def cached(file: Path) -> int:
    """Number of a file's pages that are in memory."""
    line = ["fincore", "--noheadings", "--output", "PAGES", str(file)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout or 0)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A directory of iterations that is not in memory; the one in its tracker has a large and a small file."""
    iteration = tmp_path / "iter_0000007"
    iteration.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    for name, pages in (("a_small.pt", 4), ("large.distcp", PAGES)):
        with open(iteration / name, "wb") as stream:
            stream.write(os.urandom(pages * PAGE))
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(iteration / "large.distcp"):
        pytest.skip("this file system is in memory")
    return tmp_path


def join(readahead: Readahead) -> None:
    for thread in readahead._threads:
        thread.join()


def wait_for(file: Path, pages: int) -> None:
    """The kernel returns from a request at once, and reads when the disk has time."""
    for _ in range(100):
        if cached(file) >= pages:
            return
        time.sleep(0.05)
    raise AssertionError(f"{cached(file)} of {pages} pages of {file.name}")


def test_the_tracked_iteration_is_read(save: Path) -> None:
    join(Readahead(save))
    wait_for(save / "iter_0000007" / "large.distcp", PAGES)
    wait_for(save / "iter_0000007" / "a_small.pt", 4)


def test_only_a_part_of_the_memory_is_filled(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"available": 2 * readahead._STEP * readahead._SHARE})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    join(Readahead(save))
    wait_for(save / "iter_0000007" / "large.distcp", 2 * readahead._STEP // PAGE)
    assert cached(save / "iter_0000007" / "large.distcp") < PAGES, "more than the limit"
    assert not cached(save / "iter_0000007" / "a_small.pt"), "the largest first"


def test_nothing_is_read_ahead_for_several_ranks(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    join(Readahead(save))
    assert not cached(save / "iter_0000007" / "large.distcp")


def test_missing_files_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("nonsense")
    join(Readahead(tmp_path))
    join(Readahead(tmp_path / "missing"))
