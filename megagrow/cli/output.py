"""Output of the verbs: results on standard output, notes, errors and progress on standard error.

On a terminal the output uses its width. Everywhere else the width is fixed, so that it does not depend on the machine.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megagrow.log import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

    from megagrow.report.tables import Table

WIDTH = 110
"""Columns if standard output is not a terminal and COLUMNS is not set."""
_MAX_ERROR = 4000
"""Longest error, in characters: names in a checkpoint can be very long."""


def console() -> "Console":
    """A console on standard output."""
    from rich.console import Console

    fixed = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDTH if fixed else None, highlight=False)


def show(table: "Table", *, json: bool = False) -> None:
    """Print a table for people, or as JSON."""
    from megagrow.report.tables import as_json, render_table

    if json:
        print(as_json(table))
    else:
        console().print(render_table(_printable_table(table)))


def say(text: str) -> None:
    """Print a line of a result, with names made printable."""
    print(printable(text))


def announce(line: str) -> None:
    """Show a line about progress at once."""
    print(printable(line), file=sys.stderr, flush=True)


def show_note(text: str) -> None:
    """Show a remark on a result."""
    print(f"megagrow: {printable(text)}", file=sys.stderr)


def show_error(text: str) -> None:
    """Show an error as one line."""
    line = printable(" ".join(text.split()))
    print(f"megagrow: error: {line if len(line) <= _MAX_ERROR else line[:_MAX_ERROR] + ' ...'}", file=sys.stderr)


def _printable_table(table: "Table") -> "Table":
    rows = tuple(tuple(printable(cell) if isinstance(cell, str) else cell for cell in row) for row in table.rows)
    notes = tuple(map(printable, table.footnotes))
    return dataclasses.replace(table, title=printable(table.title), rows=rows, footnotes=notes)


@contextmanager
def progress_bar(label: str, *columns: "ProgressColumn") -> Iterator[Callable[[int, int], None]]:
    """Draw a bar if standard error is a terminal; the function that is yielded takes (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
