"""`integrity.json`: hash and size of every file of a checkpoint, written last and checked before it is used."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from megagrow.bounded import is_plain_name, read_json, read_small
from megagrow.checkpoint.directory.manifest import MANIFEST
from megagrow.checkpoint.directory.marker import check_format
from megagrow.errors import CheckpointError

INTEGRITY = "integrity.json"
_MAX_BYTES = 64 << 20
_ALGORITHMS: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}


def seal(path: Path, known: Mapping[str, Mapping[str, Any]] | None = None, algorithm: str = "sha256") -> None:
    """Write the hash and size of every file of a finished checkpoint into integrity.json.

    Args:
        path: the (staging) directory.
        known: `size` and hashes by algorithm of the files that were hashed while they were written, by file name.
        algorithm: sha256, which newer Megatron uses too, or xxh3_128, which is faster.
    """
    known = known or {}
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file() and entry.name != INTEGRITY)
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(
            lambda name: known[name][algorithm] if name in known else _digest(path / name, algorithm), files
        )
        entries = {
            name: {"size": (path / name).stat().st_size, algorithm: digest}
            for name, digest in zip(files, digests, strict=True)
        }
    (path / INTEGRITY).write_text(json.dumps({"algorithm": algorithm, "files": entries}, indent=1))


def fingerprint(path: Path) -> str:
    """Return one sha256 for a whole checkpoint, that of its integrity.json; empty if it has none."""
    file = path / INTEGRITY
    return hashlib.sha256(read_small(file, _MAX_BYTES)).hexdigest() if file.is_file() else ""


def check(path: Path, *, contents: bool = True) -> None:
    """Raise CheckpointError, with the name of the file, unless a checkpoint is whole.

    Args:
        path: an iteration directory.
        contents: compare hashes too, not only names and sizes.
    """
    check_format(path)
    file = path / INTEGRITY
    if not file.is_file():
        if (path / MANIFEST).is_file():
            raise CheckpointError(f"{path}: {INTEGRITY} is missing: its writer did not finish, or the file was removed")
        return  # written by Megatron itself, without hashes: only the format's own files can be checked
    content = read_json(file, _MAX_BYTES)
    try:
        algorithm = content["algorithm"]
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm {algorithm!r:.50}")
        expected = {str(name): _size_and_hash(entry, algorithm) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from None
    for name, (size, _) in expected.items():
        if not is_plain_name(name, parts=True):
            raise CheckpointError(f"{file}: refused: {name[:200]!r} is not a file of the checkpoint")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if (found := (path / name).stat().st_size) != size and size is not None:
            raise CheckpointError(f"{path / name}: {found} bytes, {size} were written")
    if contents:
        _check_digests(path, expected, algorithm)


def _size_and_hash(entry: Any, algorithm: str) -> tuple[int | None, str]:
    """Return a file's recorded size and hash; newer Megatron records only the hash."""
    return (None, entry) if isinstance(entry, str) else (int(entry["size"]), str(entry[algorithm]))


def _check_digests(path: Path, expected: dict[str, tuple[int | None, str]], algorithm: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        digests: Iterable[str] = pool.map(lambda name: _digest(path / name, algorithm), expected)
        for (name, (_, wanted)), found in zip(expected.items(), digests, strict=True):
            if found != wanted:
                raise CheckpointError(f"{path / name}: damaged: its {algorithm} differs from the one in {INTEGRITY}")


def _digest(file: Path, algorithm: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, _ALGORITHMS[algorithm]).hexdigest()
