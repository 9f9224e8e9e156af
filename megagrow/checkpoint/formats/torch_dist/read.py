"""Megatron's torch_dist format by slice: no model, no process group, no megatron.

A checkpoint is a directory: `.metadata` (which chunk of which tensor lies where), `*.distcp` (chunks, each a small
torch.save archive), `common.pt` (what is not sharded; newer Megatron has an object `common_state` instead) and
`metadata.json` (the format, written last). A tensor has one global shape however it was cut, so a reader that
assembles any slice from the chunks that meet it is all that resharding needs, and a writer may cut as it likes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagrow.checkpoint.formats.megatron_common import canonical_common
from megagrow.checkpoint.formats.torch_dist.index import read_index
from megagrow.checkpoint.formats.torch_dist.spellings import canonical_index
from megagrow.checkpoint.index import check_cover
from megagrow.checkpoint.pickles import load_archive
from megagrow.checkpoint.reading import ChunkReader
from megagrow.errors import CheckpointError

if TYPE_CHECKING:
    pass
from megagrow.checkpoint.directory import COMMON_STATE, check_format
from megagrow.checkpoint.formats.megatron_common import unlisted


class TorchDistReader(ChunkReader):
    """Reads slices of a torch_dist checkpoint, or of any that torch.distributed.checkpoint wrote.

    Attributes:
        path: the directory.
        tensors: by canonical key, however they are spelled in the checkpoint (`canonical`).
        objects: small pickled objects by key, each an archive in a file.
    """

    def __init__(self, path: Path, *, megatron: bool = True) -> None:
        """Read the index; CheckpointError if the directory is not whole.

        Args:
            path: the directory.
            megatron: it must be Megatron's, not just torch's.
        """
        if megatron:
            check_format(path)
        tensors, objects = read_index(path / ".metadata")
        super().__init__(path, tensors, objects)
        self.check_extents()
        for key, info in tensors.items():
            check_cover(f"{path / '.metadata'}: {key}", info)
        self.tensors = canonical_index(tensors)

    def common(self) -> dict[str, Any]:
        """Return what is not sharded, as canonical tensors have it; CheckpointError if it is damaged or foreign."""
        file = self.path / "common.pt"
        if file.is_file():
            content, where = load_archive(file, str(file)), str(file)
        else:
            key = next(key for key in self.objects if _is_common_state(key))
            content, where = unlisted(self.read_object(key)), f"{self.path}: {key}"
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: holds {type(content).__name__}, not keys and values")
        return canonical_common(content)


def _is_common_state(key: str) -> bool:
    return key == COMMON_STATE or key.startswith(COMMON_STATE + "/")
