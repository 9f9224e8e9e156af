"""Where verbs print to: a terminal in its own width, anything else in a width that does not depend on where it runs."""

import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from megagrow.report.tables import Table

WIDTH = 110
"""Columns where standard output is no terminal and COLUMNS is not set: logs and files come out alike everywhere."""


def console() -> Console:
    """A console on standard output."""
    fixed = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDTH if fixed else None, highlight=False)


def show(table: "Table", *, json: bool = False) -> None:
    """Print a table for people, or the same as JSON."""
    from megagrow.report.tables import as_json, render_table

    if json:
        print(as_json(table))
    else:
        console().print(render_table(table))
