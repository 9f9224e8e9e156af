"""`megagrow` as users call it, run in this process, or from another checkout in a process of its own."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

PACKAGE = os.environ.get("MEGAGROW_PACKAGE")
"""Checkout whose megagrow is run instead of this one's: to see that a test fails on an older version."""


class CommandLine:
    """Runs `megagrow ARGUMENTS`; returns exit code, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(logging.getLogger("megagrow"), "handlers", [])
        monkeypatch.setenv("COLUMNS", "200")
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        if PACKAGE is not None:
            return self._by_process(Path(PACKAGE), [str(each) for each in arguments])
        from megagrow.cli import main as entry

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
        code, printed, error = self(*arguments)
        assert code == 2, (code, printed, error)
        assert error.startswith("megagrow: error: ") and error.count("\n") == 1, (code, error)
        return error

    def done(self, *arguments: object) -> str:
        """Run a command that must succeed; return what it printed."""
        code, printed, error = self(*arguments)
        assert code == 0, error
        return printed

    def _by_process(self, package: Path, arguments: list[str]) -> tuple[int, str, str]:
        environment = {**os.environ, "PYTHONPATH": str(package)}
        command = [sys.executable, "-m", "megagrow", *arguments]
        done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def megagrow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(monkeypatch, capfd)
