"""The options of the verb convert, and how a size is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.errors import ConfigError

if TYPE_CHECKING:
    from megagrow.convert.early import Warmup

_SIZE_SUFFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class Options:
    """The options of the command line, except source and target."""

    workers: int = 1
    memory: str = "1GiB"
    overwrite: bool = False
    restart: bool = False
    sha256: bool = False
    optimizer: bool = True
    dry_run: bool = False
    as_json: bool = False
    warmup: "Warmup | None" = None
    ignored_arguments: tuple[str, ...] = ()
    skip_checksums: bool = False
    allow_non_finite: bool = False
    schedule: str = "fresh"

    def begin(self, source: Path) -> None:
        """Start reading the source ahead, unless that was done before, while the rest is imported."""
        if self.warmup is not None and not self.dry_run:
            self.warmup.begin(source)


def parse_bytes(text: str) -> int:
    """Parse a size as users write it: 512MiB, 1g, 2GB, 1073741824; ConfigError for anything else."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = int(float(number.removesuffix(unit)) * _SIZE_SUFFIXES[unit])
        if size <= 0:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"--memory {text}: not a size; use a form like 1GiB or 512MiB") from None
    return size
