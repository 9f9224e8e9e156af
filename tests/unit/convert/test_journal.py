"""The journal of a conversion: claims are exclusive, and abandoned ones are taken over once."""

import json
import logging
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


def claimed_by_a_child(staging: Path, unit: int, *, wait: bool) -> int:
    """Let a process claim a unit and be killed; without `wait` it stays a zombie."""
    ready, signal_ready = os.pipe()

    def work() -> None:
        assert Journal(staging).claim_unit(unit)
        os.write(signal_ready, b"x")
        time.sleep(60)

    pid = forked(work)
    assert os.read(ready, 1) == b"x"
    assert not Journal(staging).claim_unit(unit), "its holder is alive"
    os.kill(pid, signal.SIGKILL)
    if wait:
        os.waitpid(pid, 0)
    return pid


UNIT = "unit-000001"
"""The claim on unit 1."""


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    Journal(tmp_path).begin({"what": "a test"})
    return tmp_path


def test_a_claim_is_exclusive_until_it_is_released(staging: Path) -> None:
    one, other = Journal(staging), Journal(staging)
    assert one.claim_unit(1) and one.holds(UNIT)
    assert not other.claim_unit(1) and not other.holds(UNIT)
    assert other.claim_unit(2)
    other.release_unit(1)
    assert one.holds(UNIT), "only the holder can release a claim"
    one.release_unit(1)
    assert other.claim_unit(1)
    assert sorted(file.name for file in (staging / DIRECTORY).iterdir()) == [
        "plan.json", "unit-000001.claim", "unit-000002.claim",
    ]  # fmt: skip


@pytest.mark.parametrize("wait", [True, False], ids=["gone", "zombie"])
def test_the_claim_of_a_dead_process_is_free(staging: Path, wait: bool) -> None:
    pid = claimed_by_a_child(staging, 1, wait=wait)
    deadline = time.monotonic() + 10
    while not Journal(staging).claim_unit(1):  # a kill takes a moment
        assert time.monotonic() < deadline
    if not wait:
        os.waitpid(pid, 0)


def test_a_claim_is_free_when_another_process_has_its_pid(staging: Path) -> None:
    assert Journal(staging).claim_unit(1)
    claim = staging / DIRECTORY / "unit-000001.claim"
    held = json.loads(claim.read_text())
    claim.write_text(json.dumps({**held, "started": held["started"] - 10}))
    assert Journal(staging).claim_unit(1)


@pytest.mark.parametrize("content", ["another host", "", "{", "[]", '{"host": 1}'])
def test_a_claim_of_an_unknown_holder_is_free_after_a_while(staging: Path, content: str) -> None:
    assert Journal(staging).claim_unit(1)
    claim = staging / DIRECTORY / "unit-000001.claim"
    held = json.loads(claim.read_text())
    claim.write_text(json.dumps({**held, "host": "elsewhere"}) if content == "another host" else content)
    assert not Journal(staging).claim_unit(1)
    before = time.time() - journal.STALE - 1
    os.utime(claim, (before, before))
    taker = Journal(staging)
    assert taker.claim_unit(1) and taker.holds(UNIT) and not Journal(staging).claim_unit(1)


def test_claims_are_kept_fresh_while_alive_and_then_released(staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BEAT", 0.01)
    claim = staging / DIRECTORY / "unit-000001.claim"
    worker = Journal(staging)
    with worker.alive():
        assert worker.claim_unit(1)
        worker.done_bytes = 77
        os.utime(claim, (1, 1))
        deadline = time.monotonic() + 10
        while claim.stat().st_mtime == 1 or Journal(staging).reported_bytes() != 77:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert not claim.exists()


def test_an_abandoned_claim_is_taken_over_once(staging: Path) -> None:
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


def test_a_damaged_journal_file_is_named_in_the_error(staging: Path) -> None:
    assert not Journal(staging).is_done(3)
    Journal(staging).finish_unit(3, {"a": {"size": 1}})
    assert Journal(staging).is_done(3)
    assert Journal(staging).finished() == {3: {"a": {"size": 1}}} and Journal(staging).finished_units() == {3}
    (staging / DIRECTORY / "unit-000003.done").write_text("{")
    with pytest.raises(CheckpointError, match=r"unit-000003\.done: damaged .*; --restart starts again"):
        Journal(staging).finished()
    for text in ("{", "[]"):
        (staging / DIRECTORY / "plan.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"plan\.json: damaged .*; --restart starts again"):
            Journal(staging).begin({"what": "a test"})


def test_claims_abandonments_and_takeovers_are_logged(staging: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("megagrow.convert")
    logger.addHandler(caplog.handler)  # the parent logger may not propagate
    try:
        with caplog.at_level(logging.DEBUG, "megagrow.convert"):
            first, second = Journal(staging), Journal(staging)
            assert first.claim_unit(1)
            os.utime(staging / DIRECTORY / "unit-000001.claim", (1, 1))
            assert second.claim_unit(1)
    finally:
        logger.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records]
    assert f"unit-000001.claim: claimed by {first._me}" in lines
    assert any(line.startswith(f"unit-000001.claim: abandoned by {first._me}: untouched for ") for line in lines)
    assert f"unit-000001.claim: taken over from {first._me} by {second._me}" in lines
