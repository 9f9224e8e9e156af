"""Scans a pickle without running it, to check that it does not allocate more memory than it is long.

A pickle is a sequence of opcodes without jumps, each followed by its argument, so a scan sees exactly what the
unpickler will. Python's C unpickler trusts two kinds of numbers in it: the length of a string or of bytes, and the
memo index of an object. The memo is an array, so five bytes can make it 64 GB long, and every entry is written: one
flipped bit does that (python/cpython#115952). No writer numbers more objects than its pickle has bytes.
"""

import pickletools
import re
from collections.abc import Iterable

_LINES = {"c": 2, "i": 2}
"""Opcodes that are followed by more than one line."""
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}

_STOP, _PUT, _LONG_PUT = b".", b"p", b"r"
_WIDTHS = {
    opcode.code: 0 if opcode.arg is None else opcode.arg.n
    for opcode in pickletools.opcodes
    if opcode.code.encode("latin-1") not in (_STOP, _PUT, _LONG_PUT)
}


def _fixed(widths: Iterable[int]) -> re.Pattern[bytes]:
    """Return a pattern that matches a run of opcodes whose arguments have a fixed width."""
    choices = []
    for width in sorted(set(widths)):
        codes = b"".join(re.escape(code.encode("latin-1")) for code, wide in _WIDTHS.items() if wide == width)
        choices.append(b"[" + codes + b"]" + (b"[\\s\\S]{%d}" % width if width else b""))
    return re.compile(b"(?:" + b"|".join(choices) + b")*+")


_SIMPLE = _fixed(width for width in _WIDTHS.values() if width >= 0)


def check_pickle(data: bytes) -> None:
    """Raise ValueError if unpickling would allocate too much memory, or if the pickle is cut short."""
    at = 0
    while True:
        simple = _SIMPLE.match(data, at)
        assert simple is not None  # the pattern also matches the empty string
        at = simple.end()
        code = data[at : at + 1]
        if code == _STOP:
            return
        if code == _LONG_PUT:
            _check_memo_index(int.from_bytes(data[at + 1 : at + 5], "little"), data)
            at += 5
        elif code == _PUT:
            end = _line(data, at + 1)
            _check_memo_index(int(data[at + 1 : end]), data)
            at = end
        else:
            at = _end_of_variable_opcode(data, at, code)


def _end_of_variable_opcode(data: bytes, at: int, code: bytes) -> int:
    """Return where an opcode of variable length ends."""
    name = code.decode("latin-1")
    width = _WIDTHS.get(name)
    if width == pickletools.UP_TO_NEWLINE:
        end = at + 1
        for _ in range(_LINES.get(name, 1)):
            end = _line(data, end)
        return end
    if width not in _LENGTHS:
        raise ValueError(f"unknown opcode at byte {at}: {code!r}")
    count, signed = _LENGTHS[width]
    length = int.from_bytes(data[at + 1 : at + 1 + count], "little", signed=signed)
    end = at + 1 + count + length
    if length < 0 or end > len(data):
        raise ValueError(f"an argument of {length} bytes at byte {at} of {len(data)}")
    return end


def _line(data: bytes, at: int) -> int:
    """Return the byte after the line that begins at `at`."""
    end = data.find(b"\n", at)
    if end < 0:
        raise ValueError(f"unterminated line at byte {at}")
    return end + 1


def _check_memo_index(index: int, data: bytes) -> None:
    if not 0 <= index <= len(data):
        raise ValueError(f"memo index {index} in a pickle of {len(data)} bytes")
