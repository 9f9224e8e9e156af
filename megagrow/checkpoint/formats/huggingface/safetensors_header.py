"""Read and write the header of a safetensors file; a file that is read is not trusted.

    8 bytes          length of the header, little-endian
    header           JSON: for each tensor its dtype, shape and data_offsets, counted from the end of the header
    values           of all tensors, without gaps

The header alone locates every value, and can be written before any value is known.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.errors import CheckpointError
from megagrow.files.bounded import parse_json_object

SAFETENSORS_DTYPES = {"F32": DType.FLOAT32, "BF16": DType.BFLOAT16, "F16": DType.FLOAT16}
"""Types of weights that are supported, by the format's names."""
_MAX_HEADER = 100_000_000
"""Limit of the format itself: every reader refuses a longer header."""
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor of a file: dtype by the format's name, shape, and the offset and length of its values in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(file: Path) -> dict[str, HeaderEntry]:
    """Return the tensors of a safetensors file by name; CheckpointError if it is damaged."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file: a header of {length} bytes in a file of {size}")
            content = parse_json_object(stream.read(length), str(file))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    content.pop("__metadata__", None)
    entries = {name: _header_entry(entry, 8 + length, f"{file}: {name}") for name, entry in content.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].length)):
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "follows a gap"
            raise CheckpointError(f"{file}: damaged: {name} {what}, at byte {entry.offset}")
        end += entry.length
    if end != size:
        what = "cut short" if end > size else "damaged"
        raise CheckpointError(f"{file}: {what}: {size} bytes, its header needs {end}")
    return entries


def write_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """Return the length and header of a file with these tensors in this order, padded to a multiple of 8 bytes."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_entry(content: Any, begin: int, where: str) -> HeaderEntry:
    """Return a checked entry of a header; `begin` is the byte of the file at which values begin."""
    try:
        dtype, shape, (start, stop) = content["dtype"], tuple(content["shape"]), content["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{where}: damaged: it lacks a dtype, a shape or two data_offsets") from None
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; supported are {', '.join(SAFETENSORS_DTYPES)}")
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise CheckpointError(f"{where}: damaged: shape {shape} at [{start}, {stop}]")
    if math.prod(shape) * _BYTES[dtype] != stop - start:
        raise CheckpointError(f"{where}: damaged: {list(shape)} of {dtype} cannot be {stop - start} bytes")
    return HeaderEntry(dtype, shape, begin + start, stop - start)
