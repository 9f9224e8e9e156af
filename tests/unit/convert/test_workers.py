"""Several processes or ranks share a conversion: the result is the same, whichever of them work or die."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megagrow.checkpoint.directory import iterations
from megagrow.convert.run import TargetSpec
from megagrow.convert.targets import choose
from megagrow.convert.targets.torch_dist import TorchDistTarget
from megagrow.convert.work import execute, unit
from megagrow.convert.work.journal import DIRECTORY, Journal
from megagrow.convert.work.rank import WorkerRank, worker_rank
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER
from tests.reference.conversions import (
    WORKER_RANK,
    assert_published,
    convert,
    cut_small,
    ended,
    files_of,
    forked,
    small_source,
    target,
    without_blocks,
)
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture
def many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TargetSpec]:
    """A source that becomes four units of real size, since worker processes are not patched to use smaller ones."""
    rest = {"kv_channels": 16, "vocab_size": 1024, "make_vocab_size_divisible_by": 2}
    small = shape({**SMALL, "hidden_size": 96, "ffn_hidden_size": 256, "num_attention_heads": 6}, **rest)
    grown = {"num_layers": 4, "hidden_size": 192, "ffn_hidden_size": 512, "num_attention_heads": 12}
    path = write_checkpoint(tmp_path_factory.mktemp("large") / "small", small, random_state(small))
    return path, target(shape({**grown, "num_query_groups": 2}, **rest))


def others_first(monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], None] = lambda staging: None) -> list[int]:
    """Delay this process's first unit until a worker has claimed or finished one; then call `then`.

    Returns a list to which the numbers of the units that this process makes are appended.
    """
    produce, made = TorchDistTarget.produce, list[int]()
    staging: list[Path] = []
    work = unit.make_units

    def remember(target: Any, directory: Path, *arguments: Any, **named: Any) -> None:
        staging.append(directory)
        work(target, directory, *arguments, **named)

    def wait_first(self: TorchDistTarget, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        if not made:
            deadline = time.monotonic() + 150
            while not workers_of(staging[0]) and not Journal(staging[0]).finished_units():
                assert time.monotonic() < deadline, "no worker started"
                time.sleep(0.01)
            then(staging[0])
        made.append(unit)
        yield from produce(self, unit)

    monkeypatch.setattr("megagrow.convert.work.worker.make_units", remember)
    monkeypatch.setattr(TorchDistTarget, "produce", wait_first)
    return made


def workers_of(staging: Path) -> set[int]:
    """The processes that hold claims, except this one."""
    found = set()
    for claim in (staging / DIRECTORY).glob("unit-*.claim"):
        try:
            found.add(json.loads(claim.read_text())["pid"])
        except FileNotFoundError:
            continue
    return found - {os.getpid()}


def test_any_workers_and_any_memory_make_the_same_bytes(
    large: tuple[Path, TargetSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = large
    undisturbed = files_of(convert(source, tmp_path / "undisturbed", wanted))
    least = (psutil.Process().memory_info().rss >> 20) + 70  # MiB
    assert files_of(convert(source, tmp_path / "narrow", wanted, memory=least << 20)) == undisturbed
    mine = others_first(monkeypatch)
    assert_published(convert(source, tmp_path / "3", wanted, workers=3, memory=3 * (least + 90) << 20), undisturbed)
    assert 0 < len(mine) < 4, "the others have made some of the units"


def test_a_killed_worker_is_survived(
    large: tuple[Path, TargetSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wanted = large
    killed: list[int] = []

    def kill(staging: Path) -> None:
        for pid in workers_of(staging):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    mine = others_first(monkeypatch, kill)
    final = convert(source, tmp_path / "large", wanted, workers=2, memory=4 << 30)
    monkeypatch.undo()
    assert killed and mine
    assert_published(final, files_of(convert(source, tmp_path / "undisturbed", wanted)))


def test_ranks_from_the_environment_share_the_work(
    source: Path, tmp_path: Path, many_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = files_of(convert(source, tmp_path / "undisturbed"))
    finish = Journal.finish_unit

    def note(self: Journal, unit: int, written: dict[str, Any]) -> None:
        (tmp_path / f"{unit} by {os.environ['RANK']}").touch()
        time.sleep(0.02)
        finish(self, unit, written)

    monkeypatch.setattr(Journal, "finish_unit", note)
    monkeypatch.setattr(WORKER_RANK, lambda: worker_rank(os.environ))

    def rank(number: int) -> None:
        os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        convert(source, tmp_path / "large", memory=8 << 30)

    children = [forked(lambda number=number: rank(number)) for number in range(2)]  # type: ignore[misc]  # a default argument of a lambda
    assert [ended(child) for child in children] == [0, 0]
    assert_published(tmp_path / "large" / "iter_0000000", undisturbed)
    made = [tuple(file.name.split(" by ")) for file in tmp_path.glob("* by *")]
    assert {rank for _, rank in made} == {"0", "1"} and len(made) == len({unit for unit, _ in made}) > 5
    with monkeypatch.context() as patched:
        patched.setattr(WORKER_RANK, lambda: WorkerRank(1, 2, 2))
        for flag in ("overwrite", "restart"):
            with pytest.raises(CheckpointError, match=f"--{flag}: 2 ranks cannot agree on what is old; remove /"):
                convert(source, tmp_path / "other", **{"memory": 8 << 30, flag: True})  # type: ignore[arg-type]  # the flag is a bool


def test_a_rank_that_starts_after_publication_makes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, final = choose.plan_target, tmp_path / "large" / "iter_0000000"

    def slow(*arguments: Any) -> Any:
        """Plan slowly: meanwhile another process does everything."""
        monkeypatch.setattr(execute, "plan_target", planned)
        assert ended(forked(lambda: convert(source, tmp_path / "large", memory=8 << 30))) == 0
        monkeypatch.setattr(TorchDistTarget, "produce", lambda self, unit: pytest.fail("a unit is made again"))
        return planned(*arguments)

    monkeypatch.setattr(execute, "plan_target", slow)
    monkeypatch.setattr(WORKER_RANK, lambda: WorkerRank(1, 2, 2))
    assert convert(source, tmp_path / "large", memory=8 << 30) == final
    assert sorted(entry.name for entry in final.parent.iterdir()) == [final.name, TRACKER]


def test_no_rank_publishes_before_the_source_is_checked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = without_blocks(write_checkpoint(tmp_path / "small", shape(SMALL), random_state(shape(SMALL))))
    with open(mine / "__0_0.distcp", "r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff\xff")
    monkeypatch.setattr(WORKER_RANK, lambda: WorkerRank(1, 2, 2))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged: its sha256"):
        convert(mine, tmp_path / "large", memory=8 << 30)
    assert iterations.published(tmp_path / "large") == []
