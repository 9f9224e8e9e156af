"""Finds the members of a torch.save archive, and reads its pickles, without unpacking the archive."""

import io
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.scan import check_pickle
from megagrow.checkpoint.pickles.stand_ins import ClosedUnpickler
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor, TensorUnpickler
from megagrow.checkpoint.pickles.zip_format import LOCAL, UTF_8
from megagrow.errors import CheckpointError

_MAX_PICKLE = 1 << 16
ByteSource = Callable[[int, int], bytes]
"""Returns `size` bytes from `offset` on, or fewer at the end: how a file is read whose checksums are compared."""
_MAX_DIRECTORY = 16 << 20
"""Longest part of an archive that `zipfile` may read: the list of its members, which a sparse file can make endless."""


@dataclass(frozen=True)
class ArchivedValues:
    """Where an archived tensor's values are stored: a view of the file from byte `offset` on, strides in entries."""

    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class FileRange(io.RawIOBase):
    """Presents a range of a file as a file, for `zipfile`."""

    def __init__(self, source: int | bytes | ByteSource, offset: int, length: int) -> None:
        self._source, self._offset, self._length, self._at = source, offset, length, 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; fewer at the end."""
        left = max(self._length - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_DIRECTORY:
            raise ValueError(f"a list of members of {size} bytes")
        data = _pread(self._source, size, self._offset + self._at)
        self._at += len(data)
        return data


def locate_tensor(source: ByteSource, offset: int, length: int, where: str) -> ArchivedValues:
    """Find the values of the only tensor in an archive.

    Args:
        source: reads the file.
        offset, length: the archive's, in bytes.
        where: its name in errors.

    Raises:
        CheckpointError: it is damaged, contains something else, or would import something.
    """
    members = ArchiveMembers(source, offset, length, where)
    view = members.unpickle("data.pkl", TensorUnpickler)
    if not isinstance(view, PickledTensor):
        raise CheckpointError(f"{where}: contains {type(view).__name__}, not a tensor")
    return members.payload(view)


class ArchiveMembers:
    """The members of an archive, by name (without the archive's own name, their common prefix)."""

    def __init__(self, source: int | bytes | ByteSource, offset: int, length: int, where: str) -> None:
        """Read the directory of an archive: in an open file, given by its descriptor or a function, or in memory."""
        self.where = where
        self._source, self._offset, self._length = source, offset, length
        try:
            with zipfile.ZipFile(FileRange(source, offset, length)) as archive:
                self._members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except CheckpointError:  # a block has changed, or cannot be read
            raise
        except Exception as error:  # a damaged zip raises nearly anything
            raise CheckpointError(f"{where}: damaged: {type(error).__name__}: {_line(error)}") from None
        if "byteorder" in self._members and self.read("byteorder", 16) != b"little":
            raise CheckpointError(f"{where}: written on a big-endian machine, which is not read")

    def unpickle(self, member: str, unpickler: type[ClosedUnpickler], limit: int = _MAX_PICKLE) -> Any:
        """Return the object pickled in a member, using an unpickler that refuses unknown names."""
        try:
            content = self.read(member, limit)
            check_pickle(content)
            return unpickler(content).load()
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {str(error).removeprefix(f'{self.where}: ')}") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"{self.where}: damaged: {type(error).__name__}: {_line(error)}") from None

    def payload(self, view: PickledTensor) -> ArchivedValues:
        """Return where a view's values are in the file; CheckpointError if the archive does not contain all of them."""
        begin, size = self.place(f"data/{view.storage.member}")
        lengths, itemsize = view.shape, view.storage.dtype.itemsize
        empty = 0 in lengths
        last = view.start + sum((n - 1) * stride for n, stride in zip(lengths, view.strides, strict=True))
        negative = min((view.start, *lengths, *view.strides)) < 0
        if negative or (not empty and (last + 1) * itemsize > size):
            raise CheckpointError(f"{self.where}: damaged: a tensor of {list(lengths)} does not fit into {size} bytes")
        if view.storage.numel * itemsize != size:
            raise CheckpointError(f"{self.where}: damaged: {view.storage.numel} values are not {size} bytes")
        return ArchivedValues(begin + view.start * itemsize, view.storage.dtype, lengths, view.strides)

    def place(self, member: str) -> tuple[int, int]:
        """Return the byte of the file at which a member's content begins, and its length."""
        info = self._members.get(member)
        if info is None:
            raise CheckpointError(f"{self.where}: damaged: {member} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.where}: {member} is compressed, which torch never writes")
        inside = 0 <= info.header_offset < self._length
        encoded = info.orig_filename.encode("utf-8" if info.flag_bits & UTF_8 else "cp437")
        length = LOCAL.size + len(encoded)
        header = _pread(self._source, length, self._offset + info.header_offset) if inside else b""
        if len(header) < length or header[:4] != b"PK\3\4" or header[LOCAL.size :] != encoded:
            raise CheckpointError(f"{self.where}: damaged: no {member} at byte {info.header_offset}")
        name, extra = LOCAL.unpack(header[: LOCAL.size])[-2:]
        begin = info.header_offset + LOCAL.size + name + extra
        if begin + info.file_size > self._length:
            raise CheckpointError(f"{self.where}: damaged: {member} extends past the end")
        return self._offset + begin, info.file_size

    def read(self, member: str, limit: int) -> bytes:
        """Return a member's content; CheckpointError if it is damaged, or longer than the limit."""
        begin, size = self.place(member)
        if size > limit:
            raise CheckpointError(f"{self.where}: refused: {member} has {size} bytes, more than the limit of {limit}")
        content = _pread(self._source, size, begin)
        if (recorded := self._members[member].CRC) and zlib.crc32(content) != recorded:
            raise CheckpointError(f"{self.where}: damaged: the CRC-32 of {member} is not the one that was written")
        return content


def _pread(source: int | bytes | ByteSource, size: int, offset: int) -> bytes:
    if isinstance(source, bytes):
        return source[offset : offset + size]
    return os.pread(source, size, offset) if isinstance(source, int) else source(size, offset)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"
