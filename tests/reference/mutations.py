"""Ways to damage or forge a checkpoint: each takes its directory, and says how many bytes of values it may change.

A mutation may well do nothing that matters. What it must never do is said in `tests/unit/convert/test_fuzz.py`.
"""

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

Mutation = Callable[[Path, random.Random, Path], int]
"""(checkpoint, chance, file that hostile code would make) -> bytes of values that may differ, unless checksums tell."""
ABSURD = (1 << 40, 1 << 70, -1, 0)
_LONG_PUT = b"Nr" + (0x0FFFFFFF).to_bytes(4, "little") + b"0"
"""None, kept at place 268,435,455 of the memo, and thrown away: two GiB of pointers."""


class Run:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path, by: Callable[..., Any]) -> None:
        self.marker, self.by = marker, by

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.by is os.system:
            return os.system, (f"touch {self.marker}",)
        return self.by, (f"open({str(self.marker)!r}, 'w')",)


def hostile(chance: random.Random, marker: Path) -> Run:
    by: list[Callable[..., Any]] = [os.system, eval, exec]
    return Run(marker, chance.choice(by))


def files_in(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


# Of any format


def flip(path: Path, chance: random.Random, marker: Path) -> int:
    """One bit, anywhere."""
    file = chance.choice(files_in(path))
    content = bytearray(file.read_bytes())
    place = chance.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return 1


def scribble(path: Path, chance: random.Random, marker: Path) -> int:
    """Up to 16 random bytes, or zeros."""
    file = chance.choice(files_in(path))
    content = bytearray(file.read_bytes())
    count = min(chance.randint(1, 16), len(content))
    place = chance.randrange(len(content) - count + 1)
    content[place : place + count] = chance.randbytes(count) if chance.random() < 0.5 else bytes(count)
    file.write_bytes(content)
    return count


def truncate(path: Path, chance: random.Random, marker: Path) -> int:
    file = chance.choice(files_in(path))
    os.truncate(file, chance.randrange(file.stat().st_size))
    return 0


def extend(path: Path, chance: random.Random, marker: Path) -> int:
    with open(chance.choice(files_in(path)), "ab") as stream:
        stream.write(chance.randbytes(chance.randint(1, 100)))
    return 0


def delete(path: Path, chance: random.Random, marker: Path) -> int:
    chance.choice(files_in(path)).unlink()
    return 0


def swap(path: Path, chance: random.Random, marker: Path) -> int:
    """Two files of different sizes; of equal ones nobody but a checksum could tell."""
    one, other = chance.sample(files_in(path), 2)
    if one.stat().st_size != other.stat().st_size:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
    return 0


ANY = (flip, scribble, truncate, extend, delete, swap, flip, scribble)


# Of torch_dist: its index


def edit(path: Path, change: Callable[[Any], None]) -> None:
    with open(path / ".metadata", "rb") as stream:
        metadata = pickle.load(stream)  # our own, not yet forged
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def tensor_of(metadata: Any, chance: random.Random) -> tuple[str, TensorStorageMetadata]:
    items = metadata.state_dict_metadata.items()
    return chance.choice(sorted((key, item) for key, item in items if isinstance(item, TensorStorageMetadata)))


def of_index(change: Callable[[Any, str, Any, int, random.Random], None]) -> Mutation:
    """A mutation of one tensor, and one of its chunks, in the index."""

    def mutate(path: Path, chance: random.Random, marker: Path) -> int:
        def apply(metadata: Any) -> None:
            key, item = tensor_of(metadata, chance)
            change(metadata, key, item, chance.randrange(len(item.chunks)), chance)

        edit(path, apply)
        return 0

    mutate.__name__ = change.__name__
    return mutate


def _changed(numbers: Any, chance: random.Random, by: int) -> torch.Size:
    changed = list(numbers)
    changed[chance.randrange(len(changed))] += by
    return torch.Size(changed)


def _place(metadata: Any, key: str, item: Any, number: int) -> Any:
    return metadata.storage_data[MetadataIndex(key, item.chunks[number].offsets)]


def duplicate_chunk(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    item.chunks.append(item.chunks[number])


def drop_chunk(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    item.chunks.pop(number)


def move_chunk(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    """It overlaps its neighbor, or lies outside."""
    chunk, place = item.chunks[number], _place(metadata, key, item, number)
    chunk.offsets = _changed(chunk.offsets, chance, chance.choice((1, 2)))
    metadata.storage_data[MetadataIndex(key, chunk.offsets)] = place


def resize_chunk(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    item.chunks[number] = ChunkStorageMetadata(
        item.chunks[number].offsets, _changed(item.chunks[number].sizes, chance, chance.choice((-1, 1, 1 << 40)))
    )


def resize_tensor(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    item.size = _changed(item.size, chance, chance.choice((-1, 1, 1 << 40)))


def another_dtype(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    item.properties.dtype = chance.choice((torch.bfloat16, torch.int32, torch.float64, torch.bool, "float32", None))


def absurd_place(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    place = _place(metadata, key, item, number)
    setattr(place, chance.choice(("offset", "length")), chance.choice((*ABSURD, None, 1.5, "7", True)))


def another_place(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    """An archive of a tensor of another shape, or a place inside one."""
    other_key, other = tensor_of(metadata, chance)
    other_place = _place(metadata, other_key, other, 0)
    place = _place(metadata, key, item, number)
    if [n for n in other.chunks[0].sizes if n > 1] != [n for n in item.chunks[number].sizes if n > 1]:
        place.offset, place.length = other_place.offset, other_place.length
    else:
        place.offset += 64


def another_file(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    paths = ("../iter_0000010/__0_0.distcp", "/etc/passwd", "nowhere.distcp", "common.pt", "", ".", b"x", None)
    _place(metadata, key, item, number).relative_path = chance.choice(paths)


def drop_tensor(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    metadata.state_dict_metadata.pop(key)


def rename_tensor(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    names = (key + "x", "", 7, None, "decoder.layers.7.mlp.linear_fc1.weight", "../" + key, key.replace("0", "\n"))
    metadata.state_dict_metadata[chance.choice(names)] = metadata.state_dict_metadata.pop(key)


def strange_values(metadata: Any, key: str, item: Any, number: int, chance: random.Random) -> None:
    """What is no list of chunks, no size, no map; one is small as a pickle and endless as a text."""
    nested: Any = ("x",)
    for _ in range(40):
        nested = [nested, nested]
    values: tuple[Any, ...] = (nested, None, 3, {}, "size")
    setattr(item, chance.choice(("chunks", "size", "properties")), chance.choice(values))


INDEX = tuple(
    of_index(change)
    for change in (
        duplicate_chunk, drop_chunk, move_chunk, resize_chunk, resize_tensor, another_dtype, absurd_place,
        another_place, another_file, drop_tensor, rename_tensor, strange_values,
    )
)  # fmt: skip


# Of torch_dist: its pickles


def hostile_index(path: Path, chance: random.Random, marker: Path) -> int:
    def plant(metadata: Any) -> None:
        key, item = tensor_of(metadata, chance)
        trap = hostile(chance, marker)
        place = chance.choice(("planner_data", "size", "key", "mcore_data"))
        if place == "size":
            item.size = trap  # type: ignore[assignment]  # a forged value
        elif place == "key":
            metadata.state_dict_metadata["trap"] = trap
        else:
            setattr(metadata, place, trap)

    edit(path, plant)
    return 0


def hostile_common(path: Path, chance: random.Random, marker: Path) -> int:
    trap = hostile(chance, marker)
    content = chance.choice((trap, {"iteration": 10, "args": trap}, {"optimizer": [trap]}))
    kind = chance.randrange(3)
    if kind == 2:
        (path / "common.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path / "common.pt", _use_new_zipfile_serialization=bool(kind))
    return 0


def _redirect(path: Path, chance: random.Random, archive: bytes) -> None:
    """Let a chunk lie in an archive of one's own, behind the others."""
    file = path / "__0_0.distcp"
    offset = file.stat().st_size
    with open(file, "ab") as stream:
        stream.write(archive)

    def point(metadata: Any) -> None:
        key, item = tensor_of(metadata, chance)
        place = _place(metadata, key, item, chance.randrange(len(item.chunks)))
        place.offset, place.length = offset, len(archive)

    edit(path, point)


def hostile_tensor(path: Path, chance: random.Random, marker: Path) -> int:
    stream = io.BytesIO()
    trap = hostile(chance, marker)
    torch.save(chance.choice((trap, [trap], {"x": trap})), stream)
    _redirect(path, chance, stream.getvalue())
    return 0


def rezipped(content: bytes, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch.save archive with another pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for info in old.infolist():
            data = member_of(old, info.filename)
            new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)
    return made.getvalue()


def member_of(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes; our own writer leaves its CRC-32 at zero, as torch can, too."""
    with archive.open(name) as member:
        member._expected_crc = None  # type: ignore[attr-defined]  # private in typeshed
        return member.read()


def greedy_pickle(path: Path, chance: random.Random, marker: Path) -> int:
    """A few bytes that make the unpickler's own memory large."""
    greedy = chance.choice((_LONG_PUT, b"\x8e" + (1 << 40).to_bytes(8, "little"), b"Np99999999999\n0"))
    stream = io.BytesIO()
    torch.save(torch.ones(2, 8), stream)
    if chance.random() < 0.5:
        content = (path / ".metadata").read_bytes()
        (path / ".metadata").write_bytes(content[:2] + greedy + content[2:])
    else:
        _redirect(path, chance, rezipped(stream.getvalue(), lambda data: data[:2] + greedy + data[2:]))
    return 0


def packed_common(path: Path, chance: random.Random, marker: Path) -> int:
    """Zeros, 128 MiB of them, compressed to as many KiB."""
    stream = io.BytesIO()
    torch.save({"iteration": 10, "x": torch.zeros(1 << 25)}, stream)
    (path / "common.pt").write_bytes(rezipped(stream.getvalue(), lambda data: data, zipfile.ZIP_DEFLATED))
    return 0


PICKLES = (hostile_index, hostile_common, hostile_tensor, greedy_pickle)
TORCH_DIST = (*ANY, *INDEX, *PICKLES, packed_common, *ANY, *PICKLES)


# Of the other formats


def header(path: Path, chance: random.Random, marker: Path) -> int:
    """Another number, type or name in the header of a safetensors file."""
    file = chance.choice(sorted(path.glob("*.safetensors")))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    name = chance.choice(sorted(set(entries) - {"__metadata__"}))
    entry = entries[name]
    field = chance.choice(("shape", "data_offsets", "dtype", "name"))
    if field == "name":
        entries[name + "x"] = entries.pop(name)
    elif field == "dtype":
        entry["dtype"] = chance.choice(("BF16", "F64", "I32", "F8_E4M3", 7, None))
    else:
        entry[field][chance.randrange(len(entry[field]))] = chance.choice((*ABSURD, 1, 7, 1.0, None, "1"))
    changed = json.dumps(entries).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    return 0


def configuration(path: Path, chance: random.Random, marker: Path) -> int:
    """Another size in config.json."""
    content = json.loads((path / "config.json").read_text())
    sizes = sorted(key for key, value in content.items() if type(value) is int)
    content[chance.choice(sizes)] = chance.choice((*ABSURD, 1, 3, 1.5, None, "8", [8]))
    (path / "config.json").write_text(json.dumps(content))
    return 0


def hostile_state(path: Path, chance: random.Random, marker: Path) -> int:
    """Code, or greed, in the pickle of a file of the older Megatron format."""
    file = chance.choice(sorted(path.rglob("*.pt")))
    if chance.random() < 0.4:
        file.write_bytes(rezipped(file.read_bytes(), lambda data: data[:2] + _LONG_PUT + data[2:]))
        return 0
    trap = hostile(chance, marker)
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        old = member_of(archive, name)
    code = pickle.dumps(trap, protocol=2)[2:-1] + b"0"  # run it, and throw away what it returns
    assert old[:1] == b"\x80"
    file.write_bytes(rezipped(file.read_bytes(), lambda data: data[:2] + code + data[2:]))
    return 0


HUGGING_FACE = (*ANY, header, header, configuration)
LEGACY = (*ANY, hostile_state, hostile_state)
