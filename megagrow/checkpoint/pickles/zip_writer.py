"""Writes torch.save archives without torch: everything but the values, of which only the sizes are needed."""

import io
import math
import struct
import zlib
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.dump import NeedsTorchError
from megagrow.checkpoint.pickles.tensor_pickle import TensorStub, pickle_with_stubs
from megagrow.checkpoint.pickles.zip_format import (
    ALIGNMENT,
    CENTRAL,
    END,
    END_64,
    END_64_LOCATOR,
    LOCAL,
    ZIP64_COUNT,
    ZIP64_SIZE,
)


@dataclass(frozen=True)
class TensorFrame:
    """The archive of a tensor, without its values: write `head`, the values row by row, then `tail`."""

    head: bytes
    tail: bytes


def tensor_frame(dtype: DType, shape: tuple[int, ...], position: int) -> TensorFrame:
    """Return what precedes and follows the values of a contiguous tensor in a torch.save archive.

    The values' CRC-32 is left at zero, as torch itself does under `set_crc32_options(False)`: torch and Megatron
    ignore it, and a checkpoint's checksums are in its integrity.json.

    Args:
        dtype, shape: the tensor's.
        position: byte of the file at which the archive will begin; the values are aligned in the file.
    """
    archive = ZipWriter(position)
    start = archive.start(pickle_with_stubs(TensorStub("0", dtype, shape)))
    header = archive.header("data/0", math.prod(shape) * dtype.itemsize)
    return TensorFrame(start + header, archive.end())


class ZipWriter:
    """Produces the headers and the directory of an uncompressed zip, for contents of which only the sizes are known."""

    def __init__(self, position: int = 0) -> None:
        """Start an archive at byte `position` of its file, in which values are aligned."""
        self._position = position
        self._at = 0
        self._entries: list[tuple[bytes, int, int, int]] = []

    @property
    def at(self) -> int:
        """Byte of the archive at which the next header, or the directory, begins."""
        return self._at

    def start(self, pickled: bytes) -> bytes:
        """Return the beginning of every torch archive: its pickle, byte order and version."""
        members = (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"))
        return b"".join(
            self.header(name, len(content), align=False, crc=zlib.crc32(content)) + content for name, content in members
        )

    def header(self, name: str, size: int, *, align: bool = True, crc: int = 0) -> bytes:
        """Return a member's header, to be followed by its content of `size` bytes."""
        full = f"archive/{name}".encode()
        self._entries.append((full, size, self._at, crc))
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= ZIP64_SIZE else b""
        start = self._position + self._at + LOCAL.size + len(full) + len(large)
        # the first four bytes of an extra field mark it as padding, as torch's own FB field does
        padding = (-start - 4) % ALIGNMENT if align else None
        extra = large + (struct.pack("<2sH", b"FB", padding) + b"Z" * padding if padding is not None else b"")
        size_field, version = (ZIP64_SIZE, 45) if large else (size, 0)
        fixed = LOCAL.pack(0x04034B50, version, 0, 0, 0, 0, crc, size_field, size_field, len(full), len(extra))
        self._at += len(fixed) + len(full) + len(extra) + size
        return fixed + full + extra

    def end(self) -> bytes:
        """Return the directory, which follows the last content."""
        tail = bytearray()
        for name, size, offset, crc in self._entries:
            wide = struct.pack("<QQ", size, size) if size >= ZIP64_SIZE else b""
            wide += struct.pack("<Q", offset) if offset >= ZIP64_SIZE else b""
            extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
            size_field, version = min(size, ZIP64_SIZE), 45 if wide else 0
            fixed = (0x02014B50, 0, version, 0, 0, 0, 0, crc, size_field, size_field, len(name), len(extra), 0, 0, 0, 0)
            tail += CENTRAL.pack(*fixed, min(offset, ZIP64_SIZE)) + name + extra
        count, length, at = len(self._entries), len(tail), self._at
        if at >= ZIP64_SIZE or count >= ZIP64_COUNT:
            tail += END_64.pack(0x06064B50, 44, 0, 45, 0, 0, count, count, length, at)
            tail += END_64_LOCATOR.pack(0x07064B50, 0, at + length, 1)
        few = min(count, ZIP64_COUNT)
        return bytes(tail + END.pack(0x06054B50, 0, 0, few, few, length, min(at, ZIP64_SIZE), 0))


def save_small(value: Any) -> bytes:
    """Return the torch.save archive of a small object; if it contains tensors, torch writes it."""
    try:
        content = pickle_with_stubs(value)
    except NeedsTorchError:
        import torch

        stream = io.BytesIO()
        torch.save(_with_torch(value), stream)
        return stream.getvalue()
    archive = ZipWriter()
    start = archive.start(content)
    return start + archive.end()


def _with_torch(value: Any) -> Any:
    """Return a value with torch's dtypes instead of ours, inside dicts, lists, tuples and arguments too."""
    if isinstance(value, DType):
        return value.torch
    if isinstance(value, Namespace):
        return Namespace(**_with_torch(vars(value)))
    if type(value) is dict:
        return {key: _with_torch(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_torch(each) for each in value)
    return value
