"""torch.save archives of one tensor, by hand: found out without unpickling, written without holding the values.

An archive is an uncompressed zip. A small pickle in it says which storage the tensor lies in, from which entry on and
with which strides; the storage's bytes are one member. So the values can be read from the file by position, and an
archive can be written as a head, the values as they come, and a tail. The pickle is read by an unpickler that knows
the three names of a plain tensor and returns their arguments: nothing of it is ever run.
"""

import io
import math
import os
import pickle
import reprlib
import struct
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.dtypes import DType
from megagrow.checkpoint.pickle_scan import check_pickle
from megagrow.checkpoint.store import row_major
from megagrow.checkpoint.torch_pickle import NeedsTorchError, dumps
from megagrow.errors import CheckpointError

ALIGNMENT = 64
_MAX_PICKLE = 1 << 16
_STORAGES = {
    "FloatStorage": DType.FLOAT32,
    "DoubleStorage": DType.FLOAT64,
    "HalfStorage": DType.FLOAT16,
    "BFloat16Storage": DType.BFLOAT16,
    "LongStorage": DType.INT64,
    "IntStorage": DType.INT32,
    "ShortStorage": DType.INT16,
    "CharStorage": DType.INT8,
    "ByteStorage": DType.UINT8,
    "BoolStorage": DType.BOOL,
}
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END_64 = struct.Struct("<IQHHIIQQQQ")
_END_64_LOCATOR = struct.Struct("<IIQI")
_BIG = 0xFFFFFFFF
_MANY = 0xFFFF
_UTF_8 = 0x800


@dataclass(frozen=True)
class Storage:
    """What a pickle says of a storage: its type, its member of the archive and its entries."""

    dtype: DType
    member: str
    numel: int


@dataclass(frozen=True)
class View:
    """What a pickle says of a tensor: a view of a storage, in entries."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Payload:
    """Where an archived tensor's values lie: a view of the file from byte `offset` on, strides in entries."""

    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Window(io.RawIOBase):
    """A range of a file as a file of its own, for `zipfile`."""

    def __init__(self, source: int | bytes, offset: int, length: int) -> None:
        self._source, self._offset, self._length, self._at = source, offset, length, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; fewer at the end."""
        left = max(self._length - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        data = _pread(self._source, size, self._offset + self._at)
        self._at += len(data)
        return data


def locate(handle: int, offset: int, length: int, where: str) -> Payload:
    """Find the values of the one plain tensor in an archive.

    Args:
        handle: of the open file.
        offset, length: of the archive, in bytes.
        where: names it in errors.

    Raises:
        CheckpointError: it is damaged, holds something else, or would import something.
    """
    members = Members(handle, offset, length, where)
    view = members.unpickle("data.pkl", TensorUnpickler)
    if not isinstance(view, View):
        raise CheckpointError(f"{where}: holds {type(view).__name__}, not a tensor")
    return members.payload(view)


class Members:
    """The members of an archive, by their name without the archive's own."""

    def __init__(self, source: int | bytes, offset: int, length: int, where: str) -> None:
        """Read the directory of the archive that lies so in an open file, by its handle, or in memory."""
        self.where = where
        self._source, self._offset, self._length = source, offset, length
        try:
            with zipfile.ZipFile(Window(source, offset, length)) as archive:
                self._members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except Exception as error:  # a damaged zip raises nearly anything
            raise CheckpointError(f"{where}: damaged: {type(error).__name__}: {_line(error)}") from None
        if "byteorder" in self._members and self._read("byteorder", 16) != b"little":
            raise CheckpointError(f"{where}: written on a big-endian machine, which is not read")

    def unpickle(self, member: str, unpickler: type[pickle.Unpickler], limit: int = _MAX_PICKLE) -> Any:
        """Return what a member's pickle holds, read by an unpickler that refuses what it does not know."""
        try:
            content = self._read(member, limit)
            check_pickle(content)
            return unpickler(io.BytesIO(content)).load()
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"{self.where}: damaged: {type(error).__name__}: {_line(error)}") from None

    def payload(self, view: View) -> Payload:
        """Where a view's values lie in the file; CheckpointError where the archive does not hold them all."""
        begin, size = self.place(f"data/{view.storage.member}")
        lengths, itemsize = view.shape, view.storage.dtype.itemsize
        empty = 0 in lengths
        last = view.start + sum((n - 1) * stride for n, stride in zip(lengths, view.strides, strict=True))
        negative = min((view.start, *lengths, *view.strides)) < 0
        if negative or (not empty and (last + 1) * itemsize > size):
            raise CheckpointError(f"{self.where}: damaged: a tensor of {list(lengths)} does not lie in {size} bytes")
        if view.storage.numel * itemsize != size:
            raise CheckpointError(f"{self.where}: damaged: {view.storage.numel} values are not {size} bytes")
        return Payload(begin + view.start * itemsize, view.storage.dtype, lengths, view.strides)

    def place(self, member: str) -> tuple[int, int]:
        """Byte of the file where a member's content begins, and its length."""
        info = self._members.get(member)
        if info is None:
            raise CheckpointError(f"{self.where}: damaged: {member} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.where}: {member} is compressed, which torch never writes")
        inside = 0 <= info.header_offset < self._length
        told = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF_8 else "cp437")
        length = _LOCAL.size + len(told)
        header = _pread(self._source, length, self._offset + info.header_offset) if inside else b""
        if len(header) < length or header[:4] != b"PK\3\4" or header[_LOCAL.size :] != told:
            raise CheckpointError(f"{self.where}: damaged: no {member} at byte {info.header_offset}")
        name, extra = _LOCAL.unpack(header[: _LOCAL.size])[-2:]
        begin = info.header_offset + _LOCAL.size + name + extra
        if begin + info.file_size > self._length:
            raise CheckpointError(f"{self.where}: damaged: {member} goes past the end")
        return self._offset + begin, info.file_size

    def _read(self, member: str, limit: int) -> bytes:
        begin, size = self.place(member)
        if size > limit:
            raise CheckpointError(f"{self.where}: refused: {member} has {size} bytes, {limit} at most make sense")
        content = _pread(self._source, size, begin)
        if (told := self._members[member].CRC) and zlib.crc32(content) != told:
            raise CheckpointError(f"{self.where}: damaged: the CRC-32 of {member} is not the one that was written")
        return content


def _pread(source: int | bytes, size: int, offset: int) -> bytes:
    return source[offset : offset + size] if isinstance(source, bytes) else os.pread(source, size, offset)


class TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows plain tensors, as views, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; CheckpointError for all others."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        module = {"__builtin__": "builtins"}.get(module, module)  # as pickles of protocol 2 say
        wanted = " ".join(f"{module}.{name}".split())
        raise CheckpointError(f"refused: it would import {wanted}, which no tensor needs")

    def persistent_load(self, pid: Any) -> Storage:
        """What the pickle says of a storage, which is a member of the archive."""
        kind, dtype, member, _, numel = pid
        if kind != "storage" or not isinstance(dtype, DType) or not isinstance(member, str):
            raise ValueError(f"a storage is {reprlib.repr(pid)}")
        return Storage(dtype, member, int(numel))


def _view(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """What stands for torch's function that rebuilds a tensor."""
    view = View(storage, start, tuple(shape), tuple(strides))
    plain = isinstance(storage, Storage) and all(type(n) is int for n in (start, *view.shape, *view.strides))
    if not plain or len(view.shape) != len(view.strides):
        raise ValueError("not a plain tensor")
    return view


class _StorageStub:
    """Stands for a storage while its tensor is pickled."""

    def __init__(self, member: str, dtype: DType, numel: int) -> None:
        self.member, self.dtype, self.numel = member, dtype, numel


class TensorStub:
    """Pickles as a contiguous tensor would that has a storage, the archive's member `data/<member>`, to itself."""

    def __init__(self, member: str, dtype: DType, shape: tuple[int, ...]) -> None:
        self.member, self.dtype, self.shape = member, dtype, shape

    def __reduce__(self) -> Any:
        storage = _StorageStub(self.member, self.dtype, math.prod(self.shape))
        return _view, (storage, 0, self.shape, row_major(self.shape), False, OrderedDict())


class _StorageType:
    """Stands for one of torch's classes of storages, all of which are names of this module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce_ex__(self, protocol: Any) -> str:
        return self._name


_TYPES = {dtype: _StorageType(name) for name, dtype in _STORAGES.items()}


def __getattr__(name: str) -> _StorageType:
    """A class of storages by its name: pickle looks whether it is there."""
    if name not in _STORAGES:
        raise AttributeError(name)
    return _TYPES[_STORAGES[name]]


_THEIRS = {
    (__name__, "_view"): ("torch._utils", "_rebuild_tensor_v2"),
    **{(__name__, name): ("torch", name) for name in _STORAGES},
}


def pickled(value: Any) -> bytes:
    """What torch.save would pickle of a value, tensors being stubs; NeedsTorchError where a real one is in it."""
    return dumps(value, _THEIRS, _storage_id)


def _storage_id(value: Any) -> Any:
    """How torch names a storage."""
    if not isinstance(value, _StorageStub):
        return None
    return ("storage", _TYPES[value.dtype], value.member, "cpu", value.numel)


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
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= _BIG else b""
        start = self._position + self._at + _LOCAL.size + len(full) + len(large)
        # four bytes say that an extra field is padding, as torch's own FB field does
        padding = (-start - 4) % ALIGNMENT if align else None
        extra = large + (struct.pack("<2sH", b"FB", padding) + b"Z" * padding if padding is not None else b"")
        told, version = (_BIG, 45) if large else (size, 0)
        fixed = _LOCAL.pack(0x04034B50, version, 0, 0, 0, 0, crc, told, told, len(full), len(extra))
        self._at += len(fixed) + len(full) + len(extra) + size
        return fixed + full + extra

    def end(self) -> bytes:
        """The directory, which comes after the last content."""
        tail = bytearray()
        for name, size, offset, crc in self._entries:
            wide = struct.pack("<QQ", size, size) if size >= _BIG else b""
            wide += struct.pack("<Q", offset) if offset >= _BIG else b""
            extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
            told, version = min(size, _BIG), 45 if wide else 0
            fixed = (0x02014B50, 0, version, 0, 0, 0, 0, crc, told, told, len(name), len(extra), 0, 0, 0, 0)
            tail += _CENTRAL.pack(*fixed, min(offset, _BIG)) + name + extra
        count, length, at = len(self._entries), len(tail), self._at
        if at >= _BIG or count >= _MANY:
            tail += _END_64.pack(0x06064B50, 44, 0, 45, 0, 0, count, count, length, at)
            tail += _END_64_LOCATOR.pack(0x07064B50, 0, at + length, 1)
        few = min(count, _MANY)
        return bytes(tail + _END.pack(0x06054B50, 0, 0, few, few, length, min(at, _BIG), 0))


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"


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


def path_text(path: Path, key: str) -> str:
    """How errors name a tensor in a file."""
    return f"{path}: {key}"
