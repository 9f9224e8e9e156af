"""Random pickles that build, set and call, and random JSON: what `pickle_fuzz` gives to a reader.

A case is drawn by its number. Its opcodes keep the stack in order most of the time, so that many of them run before
one is refused; what they name are names on the allow-lists, names that an attack would want, and a few others.
"""

import pickle
import random
import struct
from collections.abc import Callable, Sequence

CANARY = "megagrow_canary"
WANTED = (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "bytearray"),
    ("builtins", "bytes"), ("builtins", "object"), ("builtins", "type"), ("builtins", "setattr"), ("io", "open"),
    ("pathlib", "Path"), ("pathlib", "PurePath"), ("copyreg", "_reconstructor"), ("functools", "partial"),
    ("operator", "attrgetter"), ("torch", "load"), ("torch.storage", "_load_from_bytes"), ("enum", "Enum"),
    ("megagrow.checkpoint.index.dtypes", "DType"), ("megagrow.checkpoint.pickles.stand_ins", "StandIn"),
    ("megagrow.checkpoint.pickles.tensor_pickle", "PickledTensor"), ("collections", "Counter"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch._utils", "_rebuild_tensor_v3"),
)  # fmt: skip
"""Names outside the allow-lists."""
ATTRIBUTES = (CANARY, "parts", "__class__", "__defaults__", "__code__", "__dict__", "__call__", "__setstate__", "name",
              "attributes", "dtype", "shape", "value", "_value_", "__hash__", "state_dict_metadata", "storage_data",
              "is_absolute", "relative_path", "offset", "fqn", "args", "iteration")  # fmt: skip
NUMBERS = (0, 1, 2, 7, 255, 65_535, 1 << 20, (1 << 31) - 1)


def text(value: str) -> bytes:
    """Return the opcode that puts a text on the stack."""
    content = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


class Drawn:
    """A pickle that grows opcode by opcode; `height` is about how many objects are above the last mark."""

    def __init__(self, chance: random.Random, names: Sequence[tuple[str, str]]) -> None:
        self.chance, self.names = chance, names
        self.code = bytearray()
        self.notes = 0

    def draw(self, steps: int) -> bytes:
        """Return opcodes that leave one object, most of the time."""
        if self.chance.random() < 0.25:  # alter at once what a name leads to
            self._name(0)
            self._build()
        else:
            self.object(0)
        for _ in range(steps):
            self.chance.choice(self._changes())()
        return bytes(self.code)

    def object(self, depth: int) -> None:
        """Put an object on the stack."""
        if depth > 4:
            self.code += pickle.NONE
            return
        self.chance.choice(self._objects())(depth + 1)
        if self.chance.random() < 0.3:
            self.code += pickle.MEMOIZE
            self.notes += 1

    def _objects(self) -> list[Callable[[int], None]]:
        often: list[Callable[[int], None]] = [
            self._scalar,
            self._name,
            self._call,
            self._call,
            self._container,
            self._note,
        ]
        return 4 * often + [self._storage, self._odd]

    def _changes(self) -> list[Callable[[], None]]:
        return [self._build, self._build, self._build, self._set, self._append, self._call_it, self._noise]

    def _scalar(self, depth: int) -> None:
        chance = self.chance
        number = chance.choice(NUMBERS)
        choices = [
            pickle.NONE, pickle.NEWTRUE, pickle.BININT + struct.pack("<i", number), text(chance.choice(ATTRIBUTES)),
            pickle.BINFLOAT + struct.pack(">d", chance.random()), text("x" * chance.choice((0, 1, 1000, 100_000))),
            pickle.LONG1 + bytes([len(chance.randbytes(9))]) + chance.randbytes(9), pickle.EMPTY_TUPLE,
            pickle.SHORT_BINBYTES + b"\3abc", text("\x1b]0;owned\x07\x1b[31m\u202e"), text("\ud800"),
        ]  # fmt: skip
        self.code += chance.choice(choices)

    def _name(self, depth: int) -> None:
        listed = self.chance.random() < 0.97
        module, name = self.chance.choice(self.names if listed else WANTED)
        style = self.chance.random()
        if style < 0.7:
            self.code += text(module) + text(name) + pickle.STACK_GLOBAL
        else:
            self.code += pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def _call(self, depth: int) -> None:
        self._name(depth)
        self._arguments(depth)
        self.code += self.chance.choice((pickle.REDUCE, pickle.REDUCE, pickle.NEWOBJ))

    def _arguments(self, depth: int) -> None:
        if self.chance.random() < 0.1:
            self.object(depth)
            return
        self.code += pickle.MARK
        for _ in range(self.chance.choice((0, 1, 1, 2, 4, 6))):
            self.object(depth)
        self.code += pickle.TUPLE

    def _container(self, depth: int) -> None:
        kind = self.chance.randrange(4)
        self.code += (pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, b"")[kind] + pickle.MARK
        for _ in range(self.chance.randrange(4)):
            if kind == 1:
                self.code += text(self.chance.choice(ATTRIBUTES))
            self.object(depth)
        self.code += (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS, pickle.TUPLE)[kind]

    def _note(self, depth: int) -> None:
        if not self.notes:
            self._scalar(depth)
            return
        times = self.chance.choice((1, 1, 1, 3000))
        get = pickle.LONG_BINGET + struct.pack("<I", self.chance.randrange(self.notes))
        self.code += get if times == 1 else pickle.MARK + get * times + self.chance.choice((pickle.LIST, pickle.TUPLE))

    def _storage(self, depth: int) -> None:
        """What a tensor refers to, with a size that its archive may not have."""
        self.code += pickle.MARK + text("storage") + text("torch") + text("FloatStorage") + pickle.STACK_GLOBAL
        self.code += text("0") + text("cpu") + pickle.BININT + struct.pack("<i", self.chance.choice(NUMBERS))
        self.code += pickle.TUPLE + pickle.BINPERSID

    def _odd(self, depth: int) -> None:
        """Opcodes that make much of little."""
        count = self.chance.choice((10, 1000, 1_000_000))
        self.code += self.chance.choice((
            pickle.MARK + pickle.EMPTY_LIST * count + pickle.LIST,
            pickle.MARK + pickle.EMPTY_SET * count + pickle.TUPLE,
            pickle.NONE + pickle.TUPLE1 * count,
            pickle.EMPTY_LIST * count + pickle.APPEND * (count - 1),
            pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", self.chance.choice((5, count, 1 << 28))),
            pickle.BINBYTES8 + struct.pack("<Q", 1 << self.chance.choice((2, 33, 62))) + b"abcd",
            pickle.LONG4 + struct.pack("<I", count) + b"\x7f" * count,
            pickle.INT + b"9" * count + b"\n",
            pickle.EXT1 + b"\1",
        ))  # fmt: skip

    def _state(self) -> None:
        """A state for BUILD: a dict, or a dict and slots."""
        slots = self.chance.random() < 0.6
        if slots:
            self.code += pickle.NONE
        self.code += pickle.EMPTY_DICT + pickle.MARK + text(CANARY) + pickle.NEWTRUE
        for _ in range(self.chance.randrange(3)):
            self.code += text(self.chance.choice(ATTRIBUTES))
            self.object(3)
        self.code += pickle.SETITEMS + (pickle.TUPLE2 if slots else b"")

    def _build(self) -> None:
        self._state()
        self.code += pickle.BUILD

    def _set(self) -> None:
        self.code += text(CANARY)
        self.object(3)
        self.code += pickle.SETITEM

    def _append(self) -> None:
        self.object(3)
        self.code += pickle.APPEND

    def _call_it(self) -> None:
        self._arguments(3)
        self.code += self.chance.choice((pickle.REDUCE, pickle.NEWOBJ))

    def _noise(self) -> None:
        if self.chance.random() < 0.05:
            self.code += self.chance.randbytes(self.chance.randrange(1, 8))


def drawn_pickle(chance: random.Random, names: Sequence[tuple[str, str]]) -> bytes:
    """Return opcodes that build, set and call, and that leave one object most of the time."""
    return Drawn(chance, names).draw(chance.randrange(6))


def drawn_json(chance: random.Random, template: bytes) -> bytes:
    """Return a JSON text: a real one with a value replaced, or one made of nothing but greed."""
    count = chance.choice((50, 5000, 2_000_000))
    values = (
        b"[" * count, b"[" * count + b"]" * count, b'{"a":' * count + b"1" + b"}" * count, b"9" * count,
        b"[" + b"[]," * count + b"[]]", b'"' + b"x" * count + b'"', b'"\\u001b]0;owned\\u0007\\ud800"', b"-1", b"1e999",
        b"NaN", b"null", b"{}", b'{"a": 1, "a": 2}', b'"../../etc/passwd"', b'"a\\u0000b"', b'"' + b"n" * 300 + b'"',
    )  # fmt: skip
    value = chance.choice(values)
    colons = [at for at, byte in enumerate(template) if byte == ord(":")]
    if not colons or chance.random() < 0.2:
        return value
    at = chance.choice(colons) + 1
    end = min((found for found in (template.find(mark, at) for mark in (b",", b"}")) if found >= 0), default=at)
    return template[:at] + value + template[end:]
