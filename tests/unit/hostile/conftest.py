"""A checkpoint without checksums for each test to forge, and the command line with its memory and its time."""

import logging
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megagrow.cli import main as entry
from megagrow.config import ParallelLayout
from megagrow.convert.run import export_checkpoint, order_export
from megagrow.convert.work import RunOptions
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

ROOT = Path(__file__).parents[3]
MOST_MEMORY, MOST_SECONDS = 1 << 30, 60
"""Of a whole command, on a machine that is busy with other tests."""
_HARD_LIMIT = 6 << 30


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Megatron writes it: without a manifest and checksums."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("pristine"), shape(SMALL), random_state(shape(SMALL), optimizer=False), seal=False
    )
    (path / "megagrow.json").unlink()
    return path


@pytest.fixture
def path(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "iter_0000010"))


@pytest.fixture(scope="session")
def huggingface(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "model"
    order = order_export(pristine, "huggingface", "fp32", ParallelLayout(), shape(SMALL), None)
    return export_checkpoint(order, target, RunOptions()).target


@pytest.fixture
def model(huggingface: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(huggingface, tmp_path / "model"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint of megagrow's, with manifest and checksums."""
    return write_checkpoint(tmp_path / "own", shape(SMALL), random_state(shape(SMALL), optimizer=False))


@dataclass(frozen=True)
class Answer:
    """What a command printed, and what it took."""

    code: int
    out: str
    err: str
    memory: int
    seconds: float


Command = Callable[..., Answer]


@pytest.fixture
def command() -> Command:
    """Run `megagrow ARGUMENTS` as a process, and assert that it stays within the bounds and prints no traceback."""

    def call(*arguments: object) -> Answer:
        started = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "megagrow", *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_HARD_LIMIT, _HARD_LIMIT)),
        )  # fmt: skip
        out, err = child.communicate(timeout=300)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
        answer = Answer(child.returncode, out.decode(), err.decode(), peak, time.monotonic() - started)
        assert "Traceback" not in answer.err, answer.err
        return answer

    return call


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `megagrow ARGUMENTS` in this process, which is quicker where memory and time do not matter."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(logging.getLogger("megagrow"), "handlers", [])
        monkeypatch.setattr(sys, "argv", ["megagrow", *map(str, arguments)])
        capfd.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            entry.main()
        logging.getLogger("megagrow").propagate = True
        code = left.value.code or 0
        assert isinstance(code, int)
        return Answer(code, *capfd.readouterr(), 0, 0.0)

    return call


@pytest.fixture
def one_line(here: Command) -> Callable[..., str]:
    """Run a command in this process that must be refused with one line; return that line."""

    def call(*arguments: object) -> str:
        answer = here(*arguments)
        assert answer.code == 2, answer
        (line,) = answer.err.splitlines()
        assert line.startswith("megagrow: error: ") and "weights_only" not in line and line.isprintable()
        return line

    return call


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Run a command that must be refused with one line, quickly and in little memory; return that line."""

    def call(*arguments: object) -> str:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
        answer = command(*arguments)
        assert answer.code == 2, answer
        assert answer.memory < MOST_MEMORY or answer.memory == before, f"{answer.memory >> 20} MiB: {answer.err}"
        assert answer.seconds < MOST_SECONDS, answer
        (line,) = answer.err.splitlines()
        assert line.startswith("megagrow: error: ") and "weights_only" not in line and line.isprintable()
        return line

    return call
