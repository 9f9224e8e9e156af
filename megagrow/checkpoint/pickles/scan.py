"""Walk over a pickle without running it, to see that it does not ask for more memory than it is long.

A pickle is a row of opcodes without jumps, each with its argument behind it, so a walk sees exactly what the machine
will. Python's C unpickler believes two kinds of numbers in it: the length of a text or of bytes, and the place in the
memo where something is kept. The memo is an array, so five bytes make it 64 GB long, and every entry is written: one
flipped bit does that (python/cpython#115952). No writer numbers more objects than its pickle has bytes.
"""

import pickletools
import re
from collections.abc import Iterable

_LINES = {"c": 2, "i": 2}
"""Opcodes with more than one line behind them."""
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
    """Matches all opcodes at once whose arguments have a fixed width."""
    choices = []
    for width in sorted(set(widths)):
        codes = b"".join(re.escape(code.encode("latin-1")) for code, wide in _WIDTHS.items() if wide == width)
        choices.append(b"[" + codes + b"]" + (b"[\\s\\S]{%d}" % width if width else b""))
    return re.compile(b"(?:" + b"|".join(choices) + b")*+")


_SIMPLE = _fixed(width for width in _WIDTHS.values() if width >= 0)


def check_pickle(data: bytes) -> None:
    """Raise ValueError if unpickling would take memory out of proportion, or the pickle is cut short."""
    at = 0
    while True:
        simple = _SIMPLE.match(data, at)
        assert simple is not None  # it matches nothing, too
        at = simple.end()
        code = data[at : at + 1]
        if code == _STOP:
            return
        if code == _LONG_PUT:
            _check_place(int.from_bytes(data[at + 1 : at + 5], "little"), data)
            at += 5
        elif code == _PUT:
            end = _line(data, at + 1)
            _check_place(int(data[at + 1 : end]), data)
            at = end
        else:
            at = _after(data, at, code)


def _after(data: bytes, at: int, code: bytes) -> int:
    """Where the opcode behind one of varying length begins."""
    name = code.decode("latin-1")
    width = _WIDTHS.get(name)
    if width == pickletools.UP_TO_NEWLINE:
        end = at + 1
        for _ in range(_LINES.get(name, 1)):
            end = _line(data, end)
        return end
    if width not in _LENGTHS:
        raise ValueError(f"no opcode at byte {at}: {code!r}")
    count, signed = _LENGTHS[width]
    length = int.from_bytes(data[at + 1 : at + 1 + count], "little", signed=signed)
    end = at + 1 + count + length
    if length < 0 or end > len(data):
        raise ValueError(f"{length} bytes at byte {at} of {len(data)}")
    return end


def _line(data: bytes, at: int) -> int:
    """Behind the line that begins at a byte."""
    end = data.find(b"\n", at)
    if end < 0:
        raise ValueError(f"a line without an end at byte {at}")
    return end + 1


def _check_place(place: int, data: bytes) -> None:
    if not 0 <= place <= len(data):
        raise ValueError(f"place {place} of the memo, in a pickle of {len(data)} bytes")
