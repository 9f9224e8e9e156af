"""Scans a pickle without running it: it must not need much more memory and time than its length suggests.

A pickle is a sequence of opcodes without jumps, each followed by its argument, so a scan sees exactly what the
unpickler will. Python's C unpickler trusts it in four ways:

- The length of a string or of bytes is allocated before it is read.
- The memo is an array, so five bytes can make it 64 GB long, and every entry is written: one flipped bit does that
  (python/cpython#115952). Writers number objects one after another.
- An opcode of one byte makes a list of 56 bytes or a set of 216: sixty megabytes of brackets need five gigabytes.
- Tuples in tuples, as a key of a dict, are hashed by recursion in C, which overflows the stack.

The first two are checked at each opcode. For the others it is enough to count bytes and tuples in most pickles; only
a pickle that exceeds those counts is followed opcode by opcode (`walk`).
"""

import pickle
import pickletools
import re
from collections.abc import Iterable

from megagrow.checkpoint.pickles.walk import COSTS, LEAVES, MAX_TUPLES, Walk, allowance

_LINES = {"c": 2, "i": 2}
"""Opcodes that are followed by more than one line."""
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}

_STOP, _PUT, _LONG_PUT = b".", b"p", b"r"
_TUPLES = (b"t", b"\x85", b"\x86", b"\x87")
_LONGS = (b"\x8a", b"\x8b", b"I", b"L")
_REFUSED = {
    b"\x82": "an extension code", b"\x83": "an extension code", b"\x84": "an extension code",
    b"\x97": "a buffer outside", b"\x98": "a buffer outside", b"\x91": "a frozenset", b"\x96": "a bytearray",
}  # fmt: skip
"""Opcodes that no checkpoint contains; an extension code would be replaced by a class of this process."""
_MAX_LONG_BYTES, _MAX_DIGITS = 17, 40
"""Largest whole number: 128 bits and a sign, as in the state of a random generator."""
_WIDTHS = {opcode.code: 0 if opcode.arg is None else opcode.arg.n for opcode in pickletools.opcodes}
_SPECIAL = {_STOP, _PUT, _LONG_PUT, *_TUPLES, *_LONGS, *_REFUSED}


def _fixed(widths: Iterable[int]) -> str:
    """Return a pattern that matches one opcode whose argument has a fixed width."""
    choices = []
    for width in sorted(set(widths)):
        codes = "".join(
            re.escape(code)
            for code, wide in _WIDTHS.items()
            if wide == width and code.encode("latin-1") not in _SPECIAL
        )
        choices.append(f"[{codes}]" + (f"[\\s\\S]{{{width}}}" if width else ""))
    return "|".join(choices)


_NUMBER = r"(?:K[\s\S]|M[\s\S]{2}|J[\s\S]{3}[\x00-\x7f]|\x8a(?:\x05[\s\S]{4}|\x06[\s\S]{5}|\x07[\s\S]{6})[\x00-\x7f])"
_MEMO = r"(?:\x94|q[\s\S]|r[\s\S]{2}[\x00-\x01]\x00)?"
_SIZES = rf"(?:\((?:{_NUMBER})*+t|{_NUMBER}\x85|{_NUMBER}{{2}}\x86|{_NUMBER}{{3}}\x87){_MEMO}\x85?"
"""A tuple of sizes, and the tuple of arguments around it: two levels, and most tuples of an index."""
_SIMPLE = re.compile(f"(?:{_SIZES}|{_fixed(width for width in _WIDTHS.values() if width >= 0)})*+".encode("latin-1"))
_LEAF, _MEMOIZE, _END, _OTHER, _NOTHING = range(5)
_SPECIAL_KINDS = {pickle.MEMOIZE: _MEMOIZE, pickle.STOP: _END, pickle.PROTO: _NOTHING, pickle.FRAME: _NOTHING}
_CODES = [bytes([number]) for number in range(256)]
_KINDS = [_LEAF if code in LEAVES else _SPECIAL_KINDS.get(code, _OTHER) for code in _CODES]
_FIXED = [max(_WIDTHS.get(code.decode("latin-1"), -9), -9) for code in _CODES]
_COSTS = [COSTS.get(code, 0) for code in _CODES]
"""Of each byte as an opcode: its kind, the width of its argument (less than -1: it varies), and its cost."""
_MAX_OPCODES = 40_000_000


def check_pickle(data: bytes) -> None:
    """Raise ValueError if unpickling would need too much memory or time, or if the pickle is cut short."""
    tuples = _scan(data)
    # bytes that look like costly opcodes may be parts of strings, so these counts are upper limits
    costs = sum(data.count(code) * cost for code, cost in COSTS.items()) if len(data) > MAX_TUPLES else 0
    if costs > allowance(data) or tuples > MAX_TUPLES:
        _follow(data)


def _follow(data: bytes) -> None:
    """Raise ValueError if a pickle that `_scan` has passed needs too much memory, or nests tuples too deeply."""
    walk, at, cost, limit = Walk(), 0, 0, allowance(data)
    stack, memo = walk.stack, walk.memo
    try:
        for _ in range(_MAX_OPCODES):
            code = data[at]
            kind, end = _KINDS[code], at + 1 + _FIXED[code]
            if end <= at:
                end = end_of_opcode(data, at)
            if kind == _LEAF:
                stack.append(0)
            elif kind == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif kind == _OTHER:
                walk.step(data[at : at + 1], data[at + 1 : end])
            elif kind == _END:
                return
            cost += _COSTS[code]
            if cost > limit:
                raise ValueError(f"it would need more than {limit >> 20} MiB")
            at = end
    except (IndexError, KeyError):
        raise ValueError(f"it takes an object that is not there, at byte {at}") from None
    raise ValueError(f"more than {_MAX_OPCODES} opcodes")


def _scan(data: bytes) -> int:
    """Check the argument of every opcode, and return the number of tuples that are not just sizes."""
    at = tuples = 0
    while True:
        simple = _SIMPLE.match(data, at)
        assert simple is not None  # the pattern also matches the empty string
        at = simple.end()
        code = data[at : at + 1]
        if code == _STOP:
            return tuples
        if code in _TUPLES:
            tuples += 1
            at += 1
        elif code == _LONG_PUT:
            _check_memo_index(int.from_bytes(data[at + 1 : at + 5], "little"), at)
            at += 5
        elif code == _PUT:
            end = line_end(data, at + 1)
            _check_memo_index(int(data[at + 1 : end]), at)
            at = end
        elif code in _REFUSED:
            raise ValueError(f"it contains {_REFUSED[code]}, which no checkpoint needs")
        else:
            at = end_of_opcode(data, at)


def end_of_opcode(data: bytes, at: int) -> int:
    """Return where an opcode and its argument end; ValueError if the argument is too long."""
    code = data[at : at + 1]
    name = code.decode("latin-1")
    width = _WIDTHS.get(name)
    if width == pickletools.UP_TO_NEWLINE:
        end = at + 1
        for _ in range(_LINES.get(name, 1)):
            end = line_end(data, end)
        if code in _LONGS and end - at > _MAX_DIGITS:
            raise ValueError(f"a number of {end - at} digits at byte {at}")
        return end
    if width is None or width not in _LENGTHS:
        if width is not None and 0 <= width < len(data) - at:
            return at + 1 + width
        raise ValueError(f"unknown opcode at byte {at}: {code!r}")
    count, signed = _LENGTHS[width]
    length = int.from_bytes(data[at + 1 : at + 1 + count], "little", signed=signed)
    end = at + 1 + count + length
    if length < 0 or end > len(data):
        raise ValueError(f"an argument of {length} bytes at byte {at} of {len(data)}")
    if code in _LONGS and length > _MAX_LONG_BYTES:
        raise ValueError(f"a number of {length} bytes at byte {at}")
    return end


def line_end(data: bytes, at: int) -> int:
    """Return the byte after the line that begins at `at`."""
    end = data.find(b"\n", at)
    if end < 0:
        raise ValueError(f"unterminated line at byte {at}")
    return end + 1


def _check_memo_index(index: int, at: int) -> None:
    """Objects are numbered as they come: after the first 256, each takes five bytes or more."""
    if not 0 <= index <= 256 + at // 5:
        raise ValueError(f"memo index {index} at byte {at}")
