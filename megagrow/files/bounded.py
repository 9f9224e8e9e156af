"""Reads the small files of a checkpoint, which may be damaged or hostile: sizes are checked before anything is read.

Every JSON file of a checkpoint is read here. It may be at most as long as its reader expects, and as deep and as full
of numbers as a real one; what it contains is checked by the reader.
"""

import json
import os
import re
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

from megagrow.errors import CheckpointError

_MEBI = 1 << 20
_MAX_JSON = 16 * _MEBI
_MAX_DEPTH = 100
_MAX_DIGITS = 20
_FREE_ITEMS, _BYTES_PER_ITEM = 1 << 18, 16
"""Lists and objects that a text may contain: many, and one for each 16 bytes. Each takes 30 times its brackets."""
_NAME_MAX, _PATH_MAX = 255, 4096
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))


def read_small(file: Path, limit: int = _MAX_JSON, end: int | None = None) -> bytes:
    """Return the content of a file.

    Args:
        file: a regular file.
        limit: most bytes that it may have.
        end: read only so many bytes from its start; the limit does not apply.

    Raises:
        CheckpointError: it is missing, not a regular file, not readable, or larger than the limit.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block
        with open(handle, "rb") as stream:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{file}: not a file")
            if end is not None:
                return stream.read(end)
            if found.st_size > limit:
                raise CheckpointError(f"{file}: refused: it has {found.st_size:,} bytes, {limit:,} are the limit")
            return stream.read(min(found.st_size + 1, limit))  # a buffer of the limit would be made at once
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except ValueError as error:  # a name with a NUL
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: {error}") from None


def read_json(file: Path, limit: int = _MAX_JSON) -> Any:
    """Return the content of a JSON file; CheckpointError if it is missing, too large or damaged."""
    return parse_json(read_small(file, limit), str(file))


def read_json_object(file: Path, limit: int = _MAX_JSON) -> dict[str, Any]:
    """Return the keys and values in a JSON file; CheckpointError if it is missing, too large or damaged."""
    return parse_json_object(read_small(file, limit), str(file))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Return the keys and values in a JSON text; CheckpointError if it is anything else, or damaged."""
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: damaged: holds {type(content).__name__}, not keys and values")
    return content


def parse_json(text: bytes, where: str) -> Any:
    """Return the content of a JSON text.

    Raises:
        CheckpointError: it is damaged, has a key twice, is nested too deeply, or contains a number of many digits.
    """
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > _MAX_DEPTH and (fault := _fault(text, brackets)):  # else it cannot be deep
        raise CheckpointError(f"{where}: damaged: {fault}")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged: {' '.join(str(error).split())[:200]}") from None


def is_plain_name(name: object, *, parts: bool = False) -> bool:
    """Whether a value is the name of a file in a directory, and leads nowhere else.

    Args:
        name: from a checkpoint.
        parts: allow sub-directories.
    """
    if type(name) is not str or "\0" in name:
        return False
    try:
        names = [os.fsencode(each) for each in (name.split("/") if parts else [name])]
    except UnicodeEncodeError:
        return False
    inside = all(each not in (b"", b".", b"..") and b"/" not in each for each in names)
    return inside and max(map(len, names)) <= _NAME_MAX and sum(map(len, names)) < _PATH_MAX


def _fault(text: bytes, brackets: int) -> str | None:
    """Return why a text is not parsed: it is too deep, or nearly only brackets."""
    if brackets > _FREE_ITEMS + len(text) // _BYTES_PER_ITEM:
        return f"{brackets:,} brackets in {len(text):,} bytes"
    # brackets in names are rare, so strings are only removed if the text seems too deep with them
    if _is_deep(text.translate(None, _NOT_BRACKETS)) and _is_deep(
        _STRING.sub(b"", text).translate(None, _NOT_BRACKETS)
    ):
        return f"brackets in brackets, more than {_MAX_DEPTH} deep"
    return None


def _is_deep(brackets: bytes) -> bool:
    """Whether brackets are left after the innermost pairs were removed as often as they may be nested."""
    for _ in range(_MAX_DEPTH):
        inner = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if inner == brackets:  # unbalanced: the parser names the place
            return len(brackets) > _MAX_DEPTH
        brackets = inner
    return bool(brackets)


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(first for first, second in pairwise(names) if first == second)
        raise ValueError(f"duplicate key {twice[:100]!r}")
    return content
