"""`megagrow` as users call it, run in this process."""

import logging
import sys
import warnings
from typing import Any

import pytest

from megagrow.cli import main as entry


class CommandLine:
    """Runs `megagrow ARGUMENTS`; returns exit code, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(logging.getLogger("megagrow"), "handlers", [])
        monkeypatch.setenv("COLUMNS", "200")
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
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


@pytest.fixture
def megagrow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(monkeypatch, capfd)
