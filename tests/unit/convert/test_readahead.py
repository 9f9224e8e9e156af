"""What is read ahead lies in the kernel's cache, and only as much as was wanted."""

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
    """How many of a file's pages are in memory."""
    line = ["fincore", "--noheadings", "--output", "PAGES", str(file)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout or 0)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A directory of iterations with nothing in memory: a large and a small file of the one that its tracker names."""
    here = tmp_path / "iter_0000007"
    here.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    for name, pages in (("a_small.pt", 4), ("large.distcp", PAGES)):
        with open(here / name, "wb") as stream:
            stream.write(os.urandom(pages * PAGE))
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(here / "large.distcp"):
        pytest.skip("this file system lies in memory")
    return tmp_path


def join(ahead: Readahead) -> None:
    for thread in ahead._threads:
        thread.join()


def wait_for(file: Path, pages: int) -> None:
    """Reading ahead is asked for at once and done when the disk has time."""
    for _ in range(100):
        if cached(file) >= pages:
            return
        time.sleep(0.05)
    raise AssertionError(f"{cached(file)} of {pages} pages of {file.name}")


def test_the_tracked_iteration_is_read(save: Path) -> None:
    ahead = Readahead(save)
    join(ahead)
    wait_for(save / "iter_0000007" / "large.distcp", PAGES)
    wait_for(save / "iter_0000007" / "a_small.pt", 4)


def test_it_takes_a_part_of_the_memory_only(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"available": 2 * readahead._STEP * readahead._SHARE})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    ahead = Readahead(save)
    join(ahead)
    wait_for(save / "iter_0000007" / "large.distcp", 2 * readahead._STEP // PAGE)
    assert cached(save / "iter_0000007" / "large.distcp") < PAGES, "more than asked for"
    assert not cached(save / "iter_0000007" / "a_small.pt"), "the largest first"


def test_ranks_do_not_read_for_each_other(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    ahead = Readahead(save)
    join(ahead)
    assert not cached(save / "iter_0000007" / "large.distcp")


def test_what_is_not_there_is_for_others_to_say(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("nonsense")
    join(Readahead(tmp_path))
    join(Readahead(tmp_path / "missing"))
