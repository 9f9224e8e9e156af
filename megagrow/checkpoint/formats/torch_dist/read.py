"""Read Megatron's torch_dist format by slice, without a model, a process group or megatron.

    .metadata        index: which chunk of which tensor is stored in which file, and at which bytes
    __0_0.distcp     chunks, each a small torch.save archive; each rank writes files of its own
    common.pt        unsharded state; newer Megatron stores it as the object `common_state` instead
    metadata.json    name and version of the format; written last

A tensor has one global shape however it was cut. Assembling any slice from the chunks that intersect it is therefore
all that resharding needs, and a writer may cut tensors in any way.
"""

from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import COMMON_STATE, check_format, integrity
from megagrow.checkpoint.formats.megatron_common import canonical_common
from megagrow.checkpoint.formats.torch_dist.index import read_index
from megagrow.checkpoint.formats.torch_dist.spellings import canonical_index
from megagrow.checkpoint.index import check_cover
from megagrow.checkpoint.pickles import load_archive
from megagrow.checkpoint.reading import ChunkReader
from megagrow.errors import CheckpointError


class TorchDistReader(ChunkReader):
    """Reads slices of a torch_dist checkpoint, or of any other that torch.distributed.checkpoint wrote.

    Attributes:
        path: the directory.
        tensors: the index by canonical key, however the checkpoint spells its keys (see `spellings`).
        objects: small pickled objects by key, each an archive in a file.
    """

    def __init__(self, path: Path, *, megatron: bool = True, checksums: bool = True) -> None:
        """Read the index; CheckpointError if the checkpoint is incomplete.

        Args:
            path: the directory.
            megatron: whether to require Megatron's format; else any of torch.distributed.checkpoint is accepted.
            checksums: whether to compare what is read with the checksums of blocks, if there are any.
        """
        if megatron:
            check_format(path)
        if checksums:
            integrity.check_small_files(path)
        tensors, objects = read_index(path / ".metadata")
        super().__init__(path, tensors, objects, checksums=checksums)
        self.check_extents()
        for key, info in tensors.items():
            check_cover(f"{path / '.metadata'}: {key}", info)
        self.tensors = canonical_index(tensors)

    def common(self) -> dict[str, Any]:
        """Return the unsharded state that goes with canonical tensors; CheckpointError if damaged or unsafe."""
        file = self.path / "common.pt"
        if file.is_file():
            content, where = load_archive(file, str(file)), str(file)
        else:
            key = next(key for key in self.objects if _is_common_state(key))
            content, where = unwrapped_object(self.read_object(key)), f"{self.path}: {key}"
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: holds {type(content).__name__}, not keys and values")
        return canonical_common(content)


def unwrapped_object(value: Any) -> Any:
    """Return an object without the one-element list in which Megatron-Core stores it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_common_state(key: str) -> bool:
    return key == COMMON_STATE or key.startswith(COMMON_STATE + "/")
