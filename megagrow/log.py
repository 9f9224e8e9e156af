"""Loggers for people: one plain line per message on standard error; ranks other than 0 log errors only.

No program parses these lines. Numbers that a program reads are stored through `megagrow.records`.
"""

import logging
import os
import sys

from megagrow.errors import LaunchError

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def printable(text: str) -> str:
    """Return a text with everything that a terminal would obey, or not show, written as an escape; lines stay lines.

    Names come from checkpoints, and so from anyone. A name with an escape sequence could clear the screen or make the
    terminal type; one that writes from right to left could hide what it is.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


class _Formatter(logging.Formatter):
    """The format of a line, with names made printable."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record))


def setup(level: str | None = None) -> None:
    """Attach one handler to the `megagrow` logger; `MEGAGROW_LOG` (a level name) overrides `level`.

    LaunchError if RANK or MEGAGROW_LOG is set to something else than a number or a level.
    """
    root = logging.getLogger("megagrow")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
    root.setLevel("INFO")
    default = "ERROR" if number_in_environment("RANK", 0) else (level or "INFO")
    wanted = os.environ.get("MEGAGROW_LOG") or default
    if wanted.upper() not in _LEVELS:
        raise LaunchError(f"environment variable MEGAGROW_LOG={wanted!r} is no level: set one of {', '.join(_LEVELS)}")
    root.setLevel(wanted.upper())


def number_in_environment(name: str, default: int) -> int:
    """Return a number that a launcher has set; LaunchError, naming the variable, if it is not one."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise LaunchError(
            f"environment variable {name}={text!r} is not a number: unset it, or start the ranks with torchrun"
        )
    return int(text)


def get(name: str) -> logging.Logger:
    """Return the logger of a subpackage: `get("training")` is the logger `megagrow.training`."""
    return logging.getLogger(f"megagrow.{name}")
