"""Scans a pickle without running it: it must not need much more memory and time than its length suggests.

A pickle is a sequence of opcodes without jumps, each followed by its argument, so a scan sees exactly what the
unpickler will. Python's C unpickler trusts it in five ways:

- The length of a string or of bytes is allocated before it is read.
- The memo is an array, so five bytes can make it 64 GB long, and every entry is written: one flipped bit does that
  (python/cpython#115952). Writers number objects one after another.
- An opcode of one byte makes a list of 56 bytes or a set of 216: sixty megabytes of brackets need five gigabytes.
- Tuples in tuples, as a key of a dict, are hashed by recursion in C, which overflows the stack.
- Tuples of -1 and -2 all have one hash, and many of them as keys take quadratic time. So do other numbers that are not
  sizes: negative ones, fractions, and those of eight bytes.

The first two are checked at each opcode. For the third it is enough to count the bytes that may be such opcodes. For
the others, tuples are counted, and only a pickle with many is followed opcode by opcode (`walk`).
"""

import pickletools
import re
from collections.abc import Iterable
from typing import NamedTuple

from megagrow.checkpoint.pickles.walk import MAX_KEYS, Walk

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
_RARE = {b"l": 72, b"d": 80, b"o": 72, b"i": 72, b"t": 56, b"2": 16}
"""Opcodes, among them old ones, that are letters in most strings: each is counted where it is one; bytes of memory."""
_OFTEN = {
    b"]": 72, b"}": 80, b"\x8f": 232, b"(": 40, b"\x85": 56, b"\x86": 64, b"\x87": 72, b"\x81": 72, b"\x92": 72,
    b"R": 56, b"J": 40, b"G": 32, b"\x8a": 40, b"\x94": 16,
}  # fmt: skip
"""Opcodes whose bytes are rare in strings, so that counting bytes gives an upper limit that real pickles keep."""
_FREE_BYTES, _FREE_PER_BYTE = 64 << 20, 16
"""Memory that a pickle may need. An index, which has the most objects per byte, needs ten times its length."""
_MAX_TUPLES = 60_000
"""Tuples, other than plain sizes, up to which a pickle is not followed: in one another, half of a stack of 8 MiB."""
_MAX_STEPS = 8_000_000
_NO_SIZES = {*_LONGS, b"J", b"G", b"F"}
"""Opcodes of numbers that may not be sizes."""
_SPECIAL = {b"(", _STOP, _PUT, _LONG_PUT, *_TUPLES, *_NO_SIZES, *_REFUSED, *_RARE}


def _fixed(widths: Iterable[int]) -> str:
    """Return a pattern that matches opcodes whose arguments have a fixed width: one, or a run of those without any."""
    choices = []
    for width in sorted(set(widths)):
        wanted = [code for code, wide in _WIDTHS.items() if wide == width and code.encode("latin-1") not in _SPECIAL]
        codes = "".join(re.escape(code) for code in wanted)
        choices.append(f"[{codes}]" + (f"[\\s\\S]{{{width}}}" if width else "++"))
    return "|".join(choices)


_NUMBER = r"(?:K[\s\S]|M[\s\S]{2}|J[\s\S]{3}[\x00-\x7f]|\x8a(?:\x05[\s\S]{4}|\x06[\s\S]{5}|\x07[\s\S]{6})[\x00-\x7f])"
_MEMO = r"(?:\x94|q[\s\S]|r[\s\S]{2}[\x00-\x01]\x00)?"
_SIZES = rf"(?:\((?:{_NUMBER})*+t|{_NUMBER}\x85|{_NUMBER}{{2}}\x86|{_NUMBER}{{3}}\x87){_MEMO}\x85?"
"""A tuple of sizes, and the tuple of arguments around it: two levels, and most tuples of an index."""
_OTHERS = _fixed(width for width in _WIDTHS.values() if width >= 0)
_SIMPLE = re.compile(rf"(?:(?=[(KMJ\x8a])(?:{_SIZES}|{_NUMBER}|\()|{_OTHERS})*+".encode("latin-1"))


def check_pickle(data: bytes) -> None:
    """Raise ValueError if unpickling would need too much memory or time, or if the pickle is cut short."""
    found = _scan(data)
    if len(data) > 1 << 16:  # what is shorter cannot need much
        cost = found.cost + sum(data.count(code) * each for code, each in _OFTEN.items())
        if cost > _FREE_BYTES + _FREE_PER_BYTE * len(data):
            raise ValueError(f"its {len(data):,} bytes would need {cost >> 20:,} MiB")
    if found.tuples > (MAX_KEYS if found.numbers else _MAX_TUPLES):
        _follow(data)


class _Found(NamedTuple):
    """Tuples that are not just sizes, numbers that may not be sizes, and the memory that `_RARE` opcodes take."""

    tuples: int
    numbers: int
    cost: int


def _scan(data: bytes) -> _Found:
    """Check the argument of every opcode, and count what needs more than a look at one opcode."""
    at = tuples = numbers = cost = 0
    for _ in range(_MAX_STEPS):
        simple = _SIMPLE.match(data, at)
        assert simple is not None  # the pattern also matches the empty string
        at = simple.end()
        code = data[at : at + 1]
        if code == _STOP:
            return _Found(tuples, numbers, cost)
        if code in _TUPLES or code in _RARE:
            tuples += code in _TUPLES
            cost += _RARE.get(code, 0)
            at = at + 1 if code != b"i" else end_of_opcode(data, at)
        elif code == _LONG_PUT:
            _check_memo_index(int.from_bytes(data[at + 1 : at + 5], "little"), at)
            at += 5
        elif code == _PUT:
            end = line_end(data, at + 1)
            _check_memo_index(int(data[at + 1 : min(end, at + 20)]), at)
            at = end
        elif code in _REFUSED:
            raise ValueError(f"it contains {_REFUSED[code]}, which no checkpoint needs")
        else:
            numbers += code in _NO_SIZES
            at = end_of_opcode(data, at)
    raise ValueError(f"it has more than {_MAX_STEPS:,} strings and tuples")


def _follow(data: bytes) -> None:
    """Raise ValueError if a pickle that `_scan` has passed nests tuples too deeply, or has too many of them as keys."""
    walk, at = Walk(), 0
    try:
        for _ in range(_MAX_STEPS):
            at = walk.skip_leaves(data, at)
            code = data[at : at + 1]
            if code == _STOP:
                return
            end = end_of_opcode(data, at)
            walk.step(code, data[at + 1 : end])
            at = end
    except (IndexError, KeyError):
        raise ValueError(f"it takes an object that is not there, at byte {at}") from None
    raise ValueError(f"it has more than {MAX_KEYS:,} tuples and {_MAX_STEPS:,} other objects")


def end_of_opcode(data: bytes, at: int) -> int:
    """Return where an opcode and its argument end; ValueError if the argument is too long."""
    code = data[at : at + 1]
    name = code.decode("latin-1")
    width = _WIDTHS.get(name)
    if width is not None and 0 <= width < len(data) - at:
        return at + 1 + width
    if width == pickletools.UP_TO_NEWLINE:
        end = at + 1
        for _ in range(_LINES.get(name, 1)):
            end = line_end(data, end)
        if code in _LONGS and end - at > _MAX_DIGITS:
            raise ValueError(f"a number of {end - at} digits at byte {at}")
        return end
    if width is None or width not in _LENGTHS:
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
