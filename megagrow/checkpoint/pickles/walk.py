"""Follows a pickle opcode by opcode without running it, on a stack that has only the depth of each object.

This is a tenth as fast as the unpickler itself, so `scan` follows only a pickle that has very many tuples.
"""

import pickle
import re

MAX_KEYS = 5000
"""Tuples that may be keys, of a dict or a set."""
_MAX_DEPTH = 100
_LEAVES = {
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.FLOAT, pickle.BINFLOAT, pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BINBYTES8, pickle.GLOBAL, pickle.PERSID),
}
"""Opcodes with an argument that only put a new object on the stack."""
_SHORT_LEAVES = re.compile(rb"[N\x88\x89\]})\x8f][N\x88\x89\]})\x8f\x94]*+")
"""A run of those without one, and of notes in the memo."""
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


class Walk:
    """The state of an unpickler that knows, of each object, only how many tuples are in one another.

    Attributes:
        stack: depth of each object; 0 for anything but a tuple, and what is made of one.
        marks: the lengths of the stack at the marks.
        memo: depths by number.
        keys: tuples so far that are keys. Their hashes can be made to agree, which a dict answers by quadratic time.
    """

    def __init__(self) -> None:
        self.stack, self.memo = bytearray(), bytearray()
        self.marks: list[int] = []
        self.keys = 0

    def skip_leaves(self, data: bytes, at: int) -> int:
        """Put a run of simple objects on the stack; return where it ends."""
        run = _SHORT_LEAVES.match(data, at)
        if run is None:
            return at
        notes = run[0].count(pickle.MEMOIZE)
        self.stack += bytes(len(run[0]) - notes)
        self.memo += bytes(notes)
        return run.end()

    def step(self, code: bytes, argument: bytes) -> None:
        """Do what an opcode does to the stack; IndexError if it takes what is not there."""
        stack = self.stack
        if code in _LEAVES:
            stack.append(0)
        elif code == pickle.MEMOIZE:
            self.memo.append(stack[-1])
        elif code in _GETS:
            stack.append(self.memo[_number(code, argument)])
        elif code in _PUTS:
            self._put(_number(code, argument))
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

    def _put(self, number: int) -> None:
        """Note the top object under a number: the next one, as all writers do, or an earlier one."""
        if number > len(self.memo):
            raise ValueError(f"an object is noted as number {number}, after {len(self.memo)}")
        self.memo[number : number + 1] = self.stack[-1:]

    def _replace(self, count: int, deeper: int) -> None:
        """Replace the top objects by one that is as deep as the deepest of them, or one more."""
        start = len(self.stack) - count
        if start < 0:
            raise IndexError
        depth = max(self.stack[start:], default=0) + deeper
        if depth > _MAX_DEPTH:
            raise ValueError(f"tuples in tuples, more than {_MAX_DEPTH} deep")
        self.stack[start:] = bytes([depth])

    def _keyed(self, code: bytes) -> None:
        if code in _KEYED:
            self.keys += sum(depth > 0 for depth in self.stack[self.marks[-1] :: _KEYED[code]])
            if self.keys > MAX_KEYS:
                raise ValueError(f"more than {MAX_KEYS} keys that are tuples")


def _number(code: bytes, argument: bytes) -> int:
    return int(argument) if code in (pickle.PUT, pickle.GET) else int.from_bytes(argument, "little")
