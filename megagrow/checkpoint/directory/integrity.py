"""`integrity.json`: hash and size of every file of a checkpoint, written last and compared before it is used.

    {"algorithm": "sha256", "files": {name: hash}, "blocks": {...}}               as newer Megatron reads and writes it
    {"algorithm": "xxh3_128", "files": {name: {"size": 9, "xxh3_128": hash}}, "blocks": {...}}

`blocks` (see `blocks`) lets a reader compare only what it reads. Megatron and older megagrow ignore it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megagrow.checkpoint.directory.blocks import BLOCK, BlockHasher, BlockSums, described, parsed, sums_of_file
from megagrow.checkpoint.directory.manifest import MANIFEST
from megagrow.checkpoint.directory.marker import check_format
from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json, read_small

INTEGRITY = "integrity.json"
_MAX_BYTES = 64 << 20
_ALGORITHMS: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
_ENTRIES = {"algorithm", "files", "blocks"}
_READ_BY_SLICE = ".distcp"
"""Suffix of the files whose blocks are compared when a slice is read; all others are small and compared at once."""
_BUFFER = 1 << 18


@dataclass(frozen=True)
class Recorded:
    """What an integrity.json says.

    Attributes:
        algorithm: of the files' hashes.
        files: size (None where it is not recorded) and hash of each file.
        blocks: checksums of the blocks of each file; empty in older checkpoints and in those of other programs.
    """

    algorithm: str
    files: Mapping[str, tuple[int | None, str]]
    blocks: Mapping[str, BlockSums]


@dataclass(frozen=True)
class FileSums:
    """Hash of a file, and the checksums of its blocks."""

    digest: str
    blocks: BlockSums


def seal(path: Path, known: Mapping[str, Mapping[str, Any]] | None = None, algorithm: str = "sha256") -> None:
    """Write the hash and size of every file of a finished checkpoint, and of its blocks, into integrity.json.

    Args:
        path: the (staging) directory.
        known: `size`, `blocks` and hashes by algorithm of the files that were hashed while they were written, by name.
        algorithm: sha256, which newer Megatron uses too, or xxh3_128, which is faster.
    """
    given = {name: _known_sums(entry, algorithm) for name, entry in (known or {}).items()}
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file() and entry.name != INTEGRITY)
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda name: given.get(name) or _sums(path / name, algorithm), files)
        sums = dict(zip(files, made, strict=True))
    entries: dict[str, Any] = {}
    for name, each in sums.items():
        # newer Megatron knows only sha256, and expects the bare hash
        entries[name] = each.digest if algorithm == "sha256" else {"size": each.blocks.size, algorithm: each.digest}
    content = {
        "algorithm": algorithm,
        "files": entries,
        "blocks": described({name: each.blocks for name, each in sums.items()}),
    }
    (path / INTEGRITY).write_text(json.dumps(content, indent=1))


def fingerprint(path: Path) -> str:
    """Return one sha256 for a whole checkpoint, that of its integrity.json; empty if it has none."""
    file = path / INTEGRITY
    return hashlib.sha256(read_small(file, _MAX_BYTES)).hexdigest() if file.is_file() else ""


def recorded(path: Path) -> Recorded | None:
    """Return what a checkpoint's integrity.json says; None if it has none.

    Raises:
        CheckpointError: it is damaged, or megagrow wrote the checkpoint and it is missing.
    """
    file = path / INTEGRITY
    if not file.is_file():
        if (path / MANIFEST).is_file():
            raise CheckpointError(f"{path}: {INTEGRITY} is missing: its writer did not finish, or the file was removed")
        return None  # written by another program, without hashes: only the format's own files can be checked
    content = read_json(file, _MAX_BYTES)
    try:
        if not _is_checkpoints(path) and not (isinstance(content, dict) and {"algorithm", "files"} <= content.keys()):
            return None  # in a directory of another format a file of this name may be anything
        # a checkpoint without checksums of blocks is an older one, and must not be one whose entry is misspelled
        if (path / MANIFEST).is_file() and (unknown := content.keys() - _ENTRIES):
            raise ValueError(f"unknown entry {sorted(unknown)[0]!r}")
        algorithm = content["algorithm"]
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm {algorithm!r}")
        blocks = parsed(content["blocks"]) if "blocks" in content else {}
        files = {_inside(name): _size_and_hash(entry, algorithm) for name, entry in content["files"].items()}
        if "blocks" in content and blocks.keys() != files.keys():
            raise ValueError("files and blocks name different files")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from None
    return Recorded(algorithm, {name: (_size(blocks, name, size), sha) for name, (size, sha) in files.items()}, blocks)


def check(path: Path, *, contents: bool = True) -> None:
    """Raise CheckpointError, with the name of the file, unless a torch_dist checkpoint is whole.

    Args:
        path: an iteration directory.
        contents: compare hashes too, not only names and sizes.
    """
    check_format(path)
    if (known := recorded(path)) is not None:
        compare(path, known, contents=contents)


def compare(path: Path, known: Recorded, *, contents: bool) -> None:
    """Compare the files of a checkpoint of any format with its integrity.json; see `check`."""
    for name, (size, _) in known.files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if (found := (path / name).stat().st_size) != size and size is not None:
            raise CheckpointError(f"{path / name}: {found} bytes, {size} were written")
    if contents:
        _check_digests(path, known)


def check_small_files(path: Path) -> None:
    """Compare all files that are not read by slice, if a checkpoint has checksums of blocks: index, manifest, ...

    Raises:
        CheckpointError: one of them has changed or is missing, or integrity.json is damaged.
    """
    for name, wanted in blocks_of(path).items():
        if name.endswith(_READ_BY_SLICE):
            continue
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if (number := wanted.first_difference(sums_of_file(path / name, wanted.block))) is not None:
            raise wanted.damage(path / name, number)


def blocks_of(path: Path) -> Mapping[str, BlockSums]:
    """Return the checksums of a checkpoint's blocks, by file name; empty if it has none."""
    if not (path / INTEGRITY).is_file():
        return {}
    known = recorded(path)
    return {} if known is None else known.blocks


def _is_checkpoints(path: Path) -> bool:
    """Whether the integrity.json of a directory is Megatron's or megagrow's."""
    return (path / MANIFEST).is_file() or (path / "metadata.json").is_file()


def _inside(name: Any) -> str:
    """Return a file name; ValueError if it leads out of the directory."""
    if not isinstance(name, str) or name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise ValueError(f"file name {name!r}")
    return name


def _size_and_hash(entry: Any, algorithm: str) -> tuple[int | None, str]:
    """Return a file's recorded size and hash; newer Megatron records only the hash."""
    return (None, entry) if isinstance(entry, str) else (int(entry["size"]), str(entry[algorithm]))


def _size(blocks: Mapping[str, BlockSums], name: str, size: int | None) -> int | None:
    return blocks[name].size if size is None and name in blocks else size


def _known_sums(entry: Mapping[str, Any], algorithm: str) -> FileSums | None:
    """Return the sums of a file that was hashed while it was written; None if its blocks were not."""
    if "blocks" not in entry:
        return None
    return FileSums(entry[algorithm], BlockSums(entry["size"], BLOCK, bytes.fromhex(entry["blocks"])))


def _check_digests(path: Path, known: Recorded) -> None:
    algorithm = known.algorithm

    def sums(name: str) -> FileSums:
        return _sums(path / name, algorithm, known.blocks[name].block if name in known.blocks else BLOCK)

    with ThreadPoolExecutor(4) as pool:
        made: Iterable[FileSums] = pool.map(sums, known.files)
        for (name, (_, wanted)), found in zip(known.files.items(), made, strict=True):
            number = known.blocks[name].first_difference(found.blocks) if name in known.blocks else None
            if found.digest != wanted:
                where = ""
                if number is not None:
                    where = " (bytes {} to {})".format(*known.blocks[name].extent(number))
                raise CheckpointError(
                    f"{path / name}: damaged: its {algorithm} differs from the one in {INTEGRITY}{where}"
                )
            if number is not None:
                raise CheckpointError(
                    f"{path / INTEGRITY}: damaged: the checksums of the blocks of {name} do not belong to its hash"
                )


def _sums(file: Path, algorithm: str, block: int = BLOCK) -> FileSums:
    """Hash a file and its blocks in one pass, through a small buffer."""
    hasher, blocks = _ALGORITHMS[algorithm](), BlockHasher(block)
    buffer = memoryview(bytearray(_BUFFER))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
            blocks.update(buffer[:count])
    return FileSums(hasher.hexdigest(), blocks.sums())
