"""Progress of a long preparation: a bar on a terminal, a line a minute in a log file."""

import contextlib
import sys
import time
from collections.abc import Iterator

from megagrow import log

_SECONDS_BETWEEN_LINES = 60.0


class Meter:
    """Counts the bytes, documents and tokens of one source; this base class logs a line a minute."""

    def __init__(self, name: str, total_bytes: int) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.documents = self.tokens = self.bytes_read = 0
        self._start = self._last_line = time.monotonic()

    def read(self, size: int) -> None:
        """Add `size` bytes read from disk."""
        self.bytes_read += size

    def wrote(self, documents: int, tokens: int) -> None:
        """Add documents and tokens written."""
        self.documents += documents
        self.tokens += tokens
        self._show()

    def summary(self) -> str:
        """Return one line with documents, tokens and tokens per second."""
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
    """Yield a `Meter` for one source; on success, log its summary."""
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
