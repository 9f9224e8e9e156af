"""Loggers for people: one plain line per message on standard error; ranks other than 0 log errors only.

No program parses these lines. Numbers that a program reads are stored through `megagrow.records`.
"""

import logging
import os
import sys

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
    """Attach one handler to the `megagrow` logger; `MEGAGROW_LOG` (a level name) overrides `level`."""
    root = logging.getLogger("megagrow")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
    quiet = int(os.environ.get("RANK", "0")) != 0
    default = "ERROR" if quiet else (level or "INFO")
    root.setLevel(os.environ.get("MEGAGROW_LOG", default).upper())


def get(name: str) -> logging.Logger:
    """Return the logger of a subpackage: `get("training")` is the logger `megagrow.training`."""
    return logging.getLogger(f"megagrow.{name}")
