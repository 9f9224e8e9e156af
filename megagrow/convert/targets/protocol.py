"""The protocol of a target planned to the byte, which every format implements."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megagrow.convert.targets.finite import FiniteCheck


@dataclass(frozen=True)
class OutputFile:
    """A file of a target; its size is known before its first byte is written."""

    name: str
    size: int


class PlannedTarget(Protocol):
    """A target directory planned to the byte: its large files form units that can be made alone and in any order.

    A unit's files always get the same bytes, so an interrupted unit is simply made again.
    """

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the result: settings that changed, files that are missing."""

    @property
    def finite(self) -> FiniteCheck:
        """What looks at all values that `produce` yields; it raises CheckpointError there."""

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (file of the unit, its next bytes), each file from its first byte to its last, without gaps.

        A buffer may be reused for the next one, so it must be consumed before that is requested.
        """

    def finish(self, staging: Path, common: Mapping[str, Any]) -> None:
        """Complete a directory that holds the files of all units.

        Args:
            staging: the directory.
            common: the unsharded state, for formats that store one.

        Raises:
            CheckpointError: the files in the directory are not those that were planned.
        """
