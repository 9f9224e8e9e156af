"""The journal of a conversion: claims are exclusive, and those of the dead are taken over, once."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megagrow.convert.work import journal
from megagrow.convert.work.journal import DIRECTORY, Journal
from megagrow.errors import CheckpointError
from tests.reference.conversions import forked


def claimed_by_a_child(staging: Path, name: str, *, wait: bool) -> int:
    """Let a process claim something and be killed; without a wait it stays a zombie."""
    ready, told = os.pipe()

    def work() -> None:
        assert Journal(staging).claim(name)
        os.write(told, b"x")
        time.sleep(60)

    pid = forked(work)
    assert os.read(ready, 1) == b"x"
    assert not Journal(staging).claim(name), "its holder lives"
    os.kill(pid, signal.SIGKILL)
    if wait:
        os.waitpid(pid, 0)
    return pid


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    Journal(tmp_path).begin({"what": "a test"})
    return tmp_path


def test_a_claim_is_exclusive_until_it_is_given_back(staging: Path) -> None:
    one, other = Journal(staging), Journal(staging)
    assert one.claim("unit-000001") and one.holds("unit-000001")
    assert not other.claim("unit-000001") and not other.holds("unit-000001")
    assert other.claim("unit-000002")
    other.release("unit-000001")
    assert one.holds("unit-000001"), "nobody gives back what is another's"
    one.release("unit-000001")
    assert other.claim("unit-000001")
    assert sorted(file.name for file in (staging / DIRECTORY).iterdir()) == [
        "plan.json", "unit-000001.claim", "unit-000002.claim",
    ]  # fmt: skip


@pytest.mark.parametrize("wait", [True, False], ids=["gone", "zombie"])
def test_the_claim_of_a_dead_process_is_free(staging: Path, wait: bool) -> None:
    pid = claimed_by_a_child(staging, "unit-000001", wait=wait)
    deadline = time.monotonic() + 10
    while not Journal(staging).claim("unit-000001"):  # a kill takes a moment
        assert time.monotonic() < deadline
    if not wait:
        os.waitpid(pid, 0)


def test_a_pid_that_another_process_has_now_is_not_believed(staging: Path) -> None:
    assert Journal(staging).claim("unit-000001")
    claim = staging / DIRECTORY / "unit-000001.claim"
    held = json.loads(claim.read_text())
    claim.write_text(json.dumps({**held, "started": held["started"] - 10}))
    assert Journal(staging).claim("unit-000001")


@pytest.mark.parametrize("content", ["another host", "", "{", "[]", '{"host": 1}'])
def test_a_claim_that_says_nothing_of_its_holder_is_free_after_a_while(staging: Path, content: str) -> None:
    assert Journal(staging).claim("unit-000001")
    claim = staging / DIRECTORY / "unit-000001.claim"
    held = json.loads(claim.read_text())
    claim.write_text(json.dumps({**held, "host": "elsewhere"}) if content == "another host" else content)
    assert not Journal(staging).claim("unit-000001")
    before = time.time() - journal.STALE - 1
    os.utime(claim, (before, before))
    taker = Journal(staging)
    assert taker.claim("unit-000001") and taker.holds("unit-000001") and not Journal(staging).claim("unit-000001")


def test_living_claims_are_kept_fresh_and_given_back(staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BEAT", 0.01)
    claim = staging / DIRECTORY / "unit-000001.claim"
    worker = Journal(staging)
    with worker.alive():
        assert worker.claim("unit-000001")
        worker.done_bytes = 77
        os.utime(claim, (1, 1))
        deadline = time.monotonic() + 10
        while claim.stat().st_mtime == 1 or Journal(staging).told_bytes() != 77:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert not claim.exists()


def test_what_is_abandoned_is_taken_over_once(staging: Path) -> None:
    for round_ in range(12):
        name = f"unit-{round_:06d}"
        assert Journal(staging).claim(name)
        os.utime(staging / DIRECTORY / f"{name}.claim", (1, 1))
        takers, won = [Journal(staging) for _ in range(6)], list[Journal]()
        start = threading.Barrier(len(takers))

        def take(taker: Journal, name: str = name, start: threading.Barrier = start, won: list[Any] = won) -> None:
            start.wait()
            if taker.claim(name):
                won.append(taker)

        threads = [threading.Thread(target=take, args=(taker,)) for taker in takers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and won[0].holds(name)


def test_a_damaged_journal_is_named(staging: Path) -> None:
    Journal(staging).finish(3, {"a": {"size": 1}})
    assert Journal(staging).finished() == {3: {"a": {"size": 1}}} and Journal(staging).finished_units() == {3}
    (staging / DIRECTORY / "unit-000003.done").write_text("{")
    with pytest.raises(CheckpointError, match=r"unit-000003\.done: damaged .*; --restart begins again"):
        Journal(staging).finished()
    for text in ("{", "[]"):
        (staging / DIRECTORY / "plan.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"plan\.json: damaged .*; --restart begins again"):
            Journal(staging).begin({"what": "a test"})
