"""Follows a pickle opcode by opcode without running it, on a stack that has only the depth of each object.

This is a tenth as fast as the unpickler itself, so `scan` follows only a pickle that looks too costly at first sight.
"""

import pickle
from collections.abc import Mapping

COSTS: Mapping[bytes, int] = {
    pickle.EMPTY_LIST: 64, pickle.LIST: 64, pickle.EMPTY_DICT: 72, pickle.DICT: 72, pickle.EMPTY_SET: 224,
    pickle.TUPLE: 56, pickle.TUPLE1: 56, pickle.TUPLE2: 64, pickle.TUPLE3: 72, pickle.MARK: 8,
    pickle.NEWOBJ: 64, pickle.NEWOBJ_EX: 64, pickle.REDUCE: 48, pickle.OBJ: 64, pickle.INST: 64,
    pickle.BININT: 36, pickle.BINFLOAT: 24, pickle.LONG1: 36, pickle.DUP: 8, pickle.MEMOIZE: 12,
}  # fmt: skip
"""Bytes of memory that an opcode takes, roughly."""
MAX_TUPLES = 20_000
"""A pickle with more tuples than this, other than plain sizes, is followed; and so many of them may be keys."""
_MAX_DEPTH = 100
_FREE_BYTES, _FREE_PER_BYTE = 64 << 20, 10
"""Memory that a pickle may take: as much as the index of a checkpoint takes, which has the most objects per byte."""

LEAVES = {
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING),
    *(pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.EMPTY_LIST, pickle.EMPTY_DICT),
    *(pickle.EMPTY_SET, pickle.EMPTY_TUPLE, pickle.GLOBAL, pickle.PERSID),
}
"""Opcodes that only put a new object on the stack."""
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_CALLS = {pickle.REDUCE: 2, pickle.NEWOBJ: 2, pickle.NEWOBJ_EX: 3, pickle.BINPERSID: 1, pickle.STACK_GLOBAL: 2}
"""Opcodes that replace so many objects by one."""
_TO_MARK = {pickle.TUPLE, pickle.LIST, pickle.DICT, pickle.OBJ, pickle.INST}
"""Opcodes that replace everything above the mark by one object."""
_INTO = {pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS, pickle.POP_MARK}
_KEYED = {pickle.DICT: 2, pickle.SETITEMS: 2, pickle.ADDITEMS: 1}
"""Opcodes whose objects above the mark are, each or every second one, keys."""
_PUTS = {pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT}
_GETS = {pickle.GET, pickle.BINGET, pickle.LONG_BINGET}


def allowance(data: bytes) -> int:
    """Return the memory, in bytes, that a pickle may take."""
    return _FREE_BYTES + _FREE_PER_BYTE * len(data)


class Walk:
    """The state of an unpickler that knows, of each object, only how many tuples are in one another.

    Attributes:
        stack: depth of each object; 0 for anything but a tuple, and what is made of one.
        marks: the lengths of the stack at the marks.
        memo: depths by number.
        keys: tuples so far that are keys. Their hashes can be made to agree, which a dict answers by quadratic time.
    """

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}
        self.keys = 0

    def step(self, code: bytes, argument: bytes) -> None:
        """Do what an opcode does to the stack; IndexError or KeyError if it takes what is not there."""
        stack = self.stack
        if code in _PUTS:
            self.memo[_number(code, argument)] = stack[-1]
        elif code in _GETS:
            stack.append(self.memo[_number(code, argument)])
        elif code == pickle.MARK:
            self.marks.append(len(stack))
        elif code in _TUPLES:
            self._replace(_TUPLES[code], 1)
        elif code in _CALLS:
            self._replace(_CALLS[code], 0)
        elif code in _TO_MARK:
            self._keyed(code)
            self._replace(len(stack) - self.marks.pop(), int(code == pickle.TUPLE))
        elif code in _INTO:
            self._keyed(code)
            del stack[self.marks.pop() :]
        elif code == pickle.DUP:
            stack.append(stack[-1])
        elif code == pickle.SETITEM:
            self.keys += stack[-2] > 0
            del stack[-2:]
        elif code == pickle.POP and self.marks and self.marks[-1] == len(stack):
            self.marks.pop()
        elif code in (pickle.POP, pickle.APPEND, pickle.BUILD):
            stack.pop()

    def _replace(self, count: int, deeper: int) -> None:
        """Replace the top objects by one that is as deep as the deepest of them, or one more."""
        depth = max(self.stack[len(self.stack) - count :], default=0) + deeper
        del self.stack[len(self.stack) - count :]
        self.stack.append(depth)
        if depth > _MAX_DEPTH:
            raise ValueError(f"tuples in tuples, more than {_MAX_DEPTH} deep")

    def _keyed(self, code: bytes) -> None:
        if code in _KEYED:
            self.keys += sum(depth > 0 for depth in self.stack[self.marks[-1] :: _KEYED[code]])
            if self.keys > MAX_TUPLES:
                raise ValueError(f"more than {MAX_TUPLES} keys that are tuples")


def _number(code: bytes, argument: bytes) -> int:
    return int(argument) if code in (pickle.PUT, pickle.GET) else int.from_bytes(argument, "little")
