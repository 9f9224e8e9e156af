"""torch.save archives written by hand: a head, the values as they come, and a tail."""

import io
import math
import struct
import zlib
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.dump import NeedsTorchError
from megagrow.checkpoint.pickles.tensor_pickle import TensorStub, pickled
from megagrow.checkpoint.pickles.zip_format import ALIGNMENT, BIG, CENTRAL, END, END_64, END_64_LOCATOR, LOCAL, MANY


@dataclass(frozen=True)
class Frame:
    """The archive of a tensor without its values: write `head`, the values row by row, then `tail`."""

    head: bytes
    tail: bytes


def frame(dtype: DType, shape: tuple[int, ...], position: int) -> Frame:
    """Return what lies before and behind the values of a contiguous tensor in a torch.save archive.

    The values' CRC-32 is left at zero, as torch itself does under `set_crc32_options(False)`: torch and Megatron do
    not look at it, and a checkpoint's checksums are in its integrity.json.

    Args:
        dtype, shape: of the tensor.
        position: byte of the file where the archive will begin: the values are aligned in the file.
    """
    head = Zip(position)
    before = head.start(pickled(TensorStub("0", dtype, shape))) + head.header(
        "data/0", math.prod(shape) * dtype.itemsize
    )
    return Frame(before, head.end())


class Zip:
    """An uncompressed zip of which only the sizes are known: headers and directory, without the large contents."""

    def __init__(self, position: int = 0) -> None:
        """Begin an archive at byte `position` of its file, to which values are aligned."""
        self._position = position
        self._at = 0
        self._entries: list[tuple[bytes, int, int, int]] = []

    @property
    def at(self) -> int:
        """Byte of the archive where what comes next begins."""
        return self._at

    def start(self, pickled: bytes) -> bytes:
        """What every archive of torch's begins with: its pickle, byte order and version."""
        members = (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"))
        return b"".join(
            self.header(name, len(content), align=False, crc=zlib.crc32(content)) + content for name, content in members
        )

    def header(self, name: str, size: int, *, align: bool = True, crc: int = 0) -> bytes:
        """Return a member's header; its content of `size` bytes comes next."""
        full = f"archive/{name}".encode()
        self._entries.append((full, size, self._at, crc))
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= BIG else b""
        start = self._position + self._at + LOCAL.size + len(full) + len(large)
        # four bytes say that an extra field is padding, as torch's own FB field does
        padding = (-start - 4) % ALIGNMENT if align else None
        extra = large + (struct.pack("<2sH", b"FB", padding) + b"Z" * padding if padding is not None else b"")
        told, version = (BIG, 45) if large else (size, 0)
        fixed = LOCAL.pack(0x04034B50, version, 0, 0, 0, 0, crc, told, told, len(full), len(extra))
        self._at += len(fixed) + len(full) + len(extra) + size
        return fixed + full + extra

    def end(self) -> bytes:
        """The directory, which comes after the last content."""
        tail = bytearray()
        for name, size, offset, crc in self._entries:
            wide = struct.pack("<QQ", size, size) if size >= BIG else b""
            wide += struct.pack("<Q", offset) if offset >= BIG else b""
            extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
            told, version = min(size, BIG), 45 if wide else 0
            fixed = (0x02014B50, 0, version, 0, 0, 0, 0, crc, told, told, len(name), len(extra), 0, 0, 0, 0)
            tail += CENTRAL.pack(*fixed, min(offset, BIG)) + name + extra
        count, length, at = len(self._entries), len(tail), self._at
        if at >= BIG or count >= MANY:
            tail += END_64.pack(0x06064B50, 44, 0, 45, 0, 0, count, count, length, at)
            tail += END_64_LOCATOR.pack(0x07064B50, 0, at + length, 1)
        few = min(count, MANY)
        return bytes(tail + END.pack(0x06054B50, 0, 0, few, few, length, min(at, BIG), 0))


def save_small(value: Any) -> bytes:
    """The torch.save archive of a small object; where tensors are in it, torch makes it."""
    try:
        content = pickled(value)
    except NeedsTorchError:
        import torch

        stream = io.BytesIO()
        torch.save(_with_torch(value), stream)
        return stream.getvalue()
    archive = Zip()
    start = archive.start(content)
    return start + archive.end()


def _with_torch(value: Any) -> Any:
    """A value with torch's own types, through dicts, lists, tuples and arguments."""
    if isinstance(value, DType):
        return value.torch
    if isinstance(value, Namespace):
        return Namespace(**_with_torch(vars(value)))
    if type(value) is dict:
        return {key: _with_torch(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_torch(each) for each in value)
    return value
