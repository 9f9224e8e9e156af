"""Checksums of blocks: an xxh3_64 for every MiB of a file, so that any part of it can be compared when it is read.

They are stored in integrity.json next to the hashes of whole files:

    "blocks": {"algorithm": "xxh3_64", "size": 1048576, "files": {"__0_0.distcp": {"size": 9000000, "sums": "..."}}}

`sums` has 16 hexadecimal digits for each block; the last block of a file may be shorter. A checkpoint of 1 TB gets
16 MB of them. Larger blocks cost time: the rest of a block is read again whenever a slice ends inside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megagrow.errors import CheckpointError

BLOCK = 1 << 20
"""Bytes of a block in new checkpoints; readers take the size from integrity.json."""
ALGORITHM = "xxh3_64"
_SUM_BYTES = 8
_BUFFER = 1 << 18
_LEAST, _MOST = 1 << 12, 1 << 30
"""Smallest and largest block that is accepted from an integrity.json."""


@dataclass(frozen=True)
class BlockSums:
    """The checksums of a file's blocks.

    Attributes:
        size: of the file in bytes.
        block: bytes of a block.
        sums: 8 bytes for each block, in order.
    """

    size: int
    block: int
    sums: bytes

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.sums) // _SUM_BYTES

    def of(self, number: int) -> bytes:
        """Return the checksum of one block."""
        return self.sums[number * _SUM_BYTES : (number + 1) * _SUM_BYTES]

    def extent(self, number: int) -> tuple[int, int]:
        """Return the first byte of a block, and the byte after its last."""
        return number * self.block, min((number + 1) * self.block, self.size)

    def damage(self, file: Path, number: int) -> CheckpointError:
        """Return the error that names a block of a file whose bytes have changed."""
        begin, end = self.extent(number)
        return CheckpointError(
            f"{file}: damaged: bytes {begin} to {end} are not those that were written: their {ALGORITHM} differs from "
            "the one in integrity.json; restore the file from a copy"
        )

    def first_difference(self, other: "BlockSums") -> int | None:
        """Return the number of the first block with another checksum; None if all are equal."""
        pairs = range(min(len(self), len(other)))
        different = next((number for number in pairs if self.of(number) != other.of(number)), None)
        return min(len(self), len(other)) if different is None and len(self) != len(other) else different


class BlockHasher:
    """Makes the checksums of a file's blocks while it is read or written from front to back."""

    def __init__(self, block: int = BLOCK) -> None:
        self._block, self._size = block, 0
        self._hasher, self._left = xxhash.xxh3_64(), block
        self._sums = bytearray()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the file."""
        view = memoryview(data)
        self._size += len(view)
        while len(view) >= self._left:
            self._hasher.update(view[: self._left])
            view = view[self._left :]
            self._sums += self._hasher.digest()
            self._hasher.reset()
            self._left = self._block
        if len(view):
            self._hasher.update(view)
            self._left -= len(view)

    def sums(self) -> BlockSums:
        """Return the checksums of all blocks, the last and shorter one included."""
        rest = b"" if self._left == self._block else self._hasher.digest()
        return BlockSums(self._size, self._block, bytes(self._sums) + rest)


def sums_of_file(file: Path, block: int = BLOCK) -> BlockSums:
    """Return the checksums of a file's blocks, read through a small buffer."""
    hasher = BlockHasher(block)
    buffer = memoryview(bytearray(_BUFFER))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.sums()


def described(sums: Mapping[str, BlockSums]) -> dict[str, Any]:
    """Return the entry `blocks` of an integrity.json, for files that were hashed in blocks of `BLOCK` bytes."""
    files = {name: {"size": each.size, "sums": each.sums.hex()} for name, each in sums.items()}
    return {"algorithm": ALGORITHM, "size": BLOCK, "files": files}


def parsed(content: Any) -> dict[str, BlockSums]:
    """Return the checksums by file name, from the entry `blocks`; ValueError, KeyError or TypeError if malformed."""
    if content["algorithm"] != ALGORITHM:
        raise ValueError(f"algorithm {content['algorithm']!r} of blocks")
    block = content["size"]
    # a power of two, so that no single changed bit of the number gives another size that is accepted
    if type(block) is not int or not _LEAST <= block <= _MOST or block & (block - 1):
        raise ValueError(f"blocks of {block!r} bytes")
    found = {}
    for name, entry in content["files"].items():
        size, sums = entry["size"], bytes.fromhex(entry["sums"])
        if entry["sums"] != sums.hex():
            raise ValueError(f"checksums of {name} are not lower-case hexadecimal digits")
        if type(size) is not int or size < 0 or len(sums) != -(-size // block) * _SUM_BYTES:
            raise ValueError(f"{len(sums) // _SUM_BYTES} blocks of {block} bytes for the {size!r} bytes of {name}")
        found[str(name)] = BlockSums(size, block, sums)
    return found
