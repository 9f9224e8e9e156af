"""Loggers for people: plain lines on standard error, prefixed once, quiet on ranks other than 0.

Numbers that anything else reads go into `megagrow.records`; nobody parses these lines.
"""

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def setup(level: str | None = None) -> None:
    """Attach one handler to the `megagrow` logger; `MEGAGROW_LOG` (a level name) overrides `level`."""
    root = logging.getLogger("megagrow")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
    quiet = int(os.environ.get("RANK", "0")) != 0
    default = "ERROR" if quiet else (level or "INFO")
    root.setLevel(os.environ.get("MEGAGROW_LOG", default).upper())


def get(name: str) -> logging.Logger:
    """Return the logger of a room: `get("training")` is `megagrow.training`."""
    return logging.getLogger(f"megagrow.{name}")
