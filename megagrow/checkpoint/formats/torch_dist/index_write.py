"""Write the small files of a torch_dist checkpoint: the index `.metadata`, common.pt and metadata.json.

metadata.json is written last, so a directory without it is recognized as incomplete.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.torch_dist import index_classes
from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import save_small

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
ArchiveLocation = tuple[str, int, int]
"""File, offset and length of a torch.save archive."""


@dataclass(frozen=True)
class ChunkEntry:
    """A chunk of a tensor: its first corner and its sizes in the global tensor, and the location of its archive."""

    key: str
    corner: tuple[int, ...]
    sizes: tuple[int, ...]
    place: ArchiveLocation


def write_index(
    directory: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], DType]],
    entries: Iterable[ChunkEntry],
    objects: Mapping[str, ArchiveLocation],
    common: Mapping[str, Any],
) -> None:
    """Write common.pt, the index of the data files, and last metadata.json, which completes the checkpoint.

    Args:
        directory: of the checkpoint, with the data files already in it.
        shapes: global shape and type of each tensor.
        entries: the chunks of all tensors.
        objects: location of each small object's archive.
        common: the unsharded state.
    """
    content: dict[str, Any] = {
        key: index_classes.TensorStorageMetadata(dtype, shape) for key, (shape, dtype) in shapes.items()
    }
    storage: dict[Any, Any] = {}
    for entry in entries:
        content[entry.key].chunks.append(index_classes.ChunkStorageMetadata(entry.corner, entry.sizes))
        storage[index_classes.MetadataIndex(entry.key, entry.corner)] = index_classes.StorageInfo(*entry.place)
    for key, place in objects.items():
        content[key] = index_classes.BytesStorageMetadata()
        storage[index_classes.MetadataIndex(key)] = index_classes.StorageInfo(*place)
    # as bytes, because torch.save to a path turns a full disk into a RuntimeError
    (directory / "common.pt").write_bytes(save_small(dict(common)))
    (directory / ".metadata").write_bytes(index_classes.dump(index_classes.Metadata(content, storage)))
    (directory / "metadata.json").write_text(json.dumps(FORMAT))
