"""A family.yaml of one tiny stage, and `megagrow` run in this process, for tests of stages and their sources."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagrow.cli import main as entry
from megagrow.config import ModelShape
from tools.reference.tiny_checkpoint import LARGE, random_state, shape, write_checkpoint

Answer = tuple[int, str, str]


class CommandLine:
    """Runs `megagrow ARGUMENTS`; returns exit code, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(logging.getLogger("megagrow"), "handlers", [])
        monkeypatch.setenv("COLUMNS", "200")
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: object) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["megagrow", *map(str, arguments)])
        self._capfd.readouterr()
        with warnings.catch_warnings():
            try:
                entry.main()
                code: Any = 0
            except SystemExit as left:
                code = left.code or 0
        logging.getLogger("megagrow").propagate = True
        return (code, *self._capfd.readouterr())

    def refused(self, *arguments: object) -> str:
        """Run a command that must fail with one line and exit code 2; return the line."""
        code, _, error = self(*arguments)
        assert code == 2 and error.startswith("megagrow: error: ") and error.count("\n") == 1, (code, error)
        return error

    def done(self, *arguments: object) -> str:
        """Run a command that must succeed; return what it printed."""
        code, printed, error = self(*arguments)
        assert code == 0, error
        return printed


@pytest.fixture
def megagrow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line, in this process."""
    return CommandLine(monkeypatch, capfd)


def large_shape(**others: Any) -> ModelShape:
    """The shape of the only stage, but for `others`."""
    return shape({}, **LARGE | others)


def write_family(folder: Path, model: ModelShape, **stage: Any) -> Path:
    """Write a family.yaml with one stage, `grown`, of this shape; fields at their defaults are left out."""
    fields = model.model_dump(mode="json", exclude_defaults=True)
    tree = {
        "name": "tiny",
        "save": str(folder / "runs"),
        "data": {"sources": [{"paths": ["a.txt"]}]},
        "stages": [
            {"name": "grown", "model": fields, "batch": {"micro_batch_size": 1, "global_batch_size": 1},
             "precision": "fp32", **stage},
        ],
    }  # fmt: skip
    file = folder / "family.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def write_source(folder: Path, of: ModelShape, *, optimizer: bool = False, **manifest: Any) -> Path:
    """Write a checkpoint of random fp32 weights; return its directory."""
    return write_checkpoint(folder, of, random_state(of, optimizer=optimizer), **manifest)
