"""A target planned to the byte: what every format promises to those who make its files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class OutputFile:
    """A file of a target, its size known before its first byte is written."""

    name: str
    size: int


class PlannedTarget(Protocol):
    """A target directory planned to the byte: large files in units, any of which can be made alone and in any order.

    A unit's files always come out the same, so a unit that was interrupted is simply made again.
    """

    @property
    def units(self) -> tuple[tuple[OutputFile, ...], ...]:
        """The files of each unit."""

    def produce(self, unit: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """Yield (file of the unit, its next bytes), each file from its first byte to its last, without gaps.

        A buffer is used before the next one is asked for, so it may be used again.
        """
