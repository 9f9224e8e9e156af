"""Pickles put together by hand: pieces of opcodes, and where in a checkpoint they can lie."""

import io
import pickle
import zipfile
from pathlib import Path

CANARY = "megagrow_canary"
PUT_CANARY = pickle.UNICODE + CANARY.encode() + b"\n" + pickle.NEWTRUE
"""A key and a value, for SETITEM."""


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + len(content).to_bytes(4, "little") + content


def named(module: str, name: str) -> bytes:
    """Put what a name is replaced by on the stack."""
    return text(module) + text(name) + pickle.STACK_GLOBAL


def attributes(*names: str) -> bytes:
    """A dict with these keys, and True as each value."""
    return pickle.EMPTY_DICT + b"".join(text(name) + pickle.NEWTRUE + pickle.SETITEM for name in names)


def slots(*names: str) -> bytes:
    """A state by which BUILD sets attributes, not keys of a `__dict__`."""
    return pickle.NONE + attributes(*names) + pickle.TUPLE2


def before(content: bytes, code: bytes) -> bytes:
    """Return a pickle that first runs opcodes and throws away the one object that they leave."""
    header = 2 if content[:1] == pickle.PROTO else 0
    frame = 9 if content[header : header + 1] == pickle.FRAME else 0  # frames are optional, and must have their length
    return content[:header] + code + pickle.POP + content[header + frame :]


def whole(code: bytes) -> bytes:
    """Return a pickle of what the opcodes leave."""
    return pickle.PROTO + b"\x04" + code + pickle.STOP


def archive(content: bytes, **members: bytes) -> bytes:
    """Return a torch.save archive with this pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, data in {"data.pkl": content, "byteorder": b"little", "version": b"3\n", **members}.items():
            made.writestr(f"archive/{name}", data)
    return stream.getvalue()


def pickle_in(file: Path) -> bytes:
    """Return the pickle of a torch.save archive."""
    with zipfile.ZipFile(file) as made:
        (name,) = (name for name in made.namelist() if name.endswith("data.pkl"))
        return made.read(name)


def plant(path: Path, name: str, code: bytes) -> None:
    """Run opcodes at the beginning of a checkpoint's `.metadata` or `common.pt`."""
    file = path / name
    if name == ".metadata":
        file.write_bytes(before(file.read_bytes(), code))
    else:
        file.write_bytes(archive(before(pickle_in(file), code)))
