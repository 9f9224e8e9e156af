"""How far a long preparation is: a bar for a person at a terminal, a line now and then for a log file."""

import contextlib
import sys
import time
from collections.abc import Iterator

from megagrow import log

_SECONDS_BETWEEN_LINES = 60.0


class Meter:
    """Counts what one source has given so far; the base only counts and writes a line a minute."""

    def __init__(self, name: str, total_bytes: int) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.documents = self.tokens = self.bytes_read = 0
        self._start = self._last_line = time.monotonic()

    def read(self, size: int) -> None:
        """`size` more bytes were read from disk."""
        self.bytes_read += size

    def wrote(self, documents: int, tokens: int) -> None:
        """So many more documents and tokens were written."""
        self.documents += documents
        self.tokens += tokens
        self._show()

    def summary(self) -> str:
        """One line for people: documents, tokens and tokens a second."""
        seconds = time.monotonic() - self._start
        speed = self.tokens / max(seconds, 1e-9)
        return f"{self.name}: {self.documents:,} documents, {self.tokens:,} tokens, {speed:,.0f} tokens/s"

    def _show(self) -> None:
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = self.bytes_read / max(self.total_bytes, 1)
            log.get("data").info("%s (%.0f %% read)", self.summary(), 100 * share)


@contextlib.contextmanager
def meter(name: str, total_bytes: int) -> Iterator[Meter]:
    """Yield a `Meter` for one source; its last line goes to the log on success."""
    if sys.stderr.isatty():
        with _bar(name, total_bytes) as counting:
            yield counting
    else:
        counting = Meter(name, total_bytes)
        yield counting
    log.get("data").info(counting.summary())


@contextlib.contextmanager
def _bar(name: str, total_bytes: int) -> Iterator[Meter]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total_bytes)

        class Bar(Meter):
            def _show(self) -> None:
                progress.update(task, completed=self.bytes_read, description=self.summary())

        yield Bar(name, total_bytes)
