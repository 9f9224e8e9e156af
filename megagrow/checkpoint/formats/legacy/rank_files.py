"""Read the files of a legacy checkpoint, one directory per model-parallel rank, without loading a tensor.

Each file is one large torch.save archive: a pickle of nested dicts in which a tensor is a few numbers that locate its
values in the archive. Only the pickle is read, by an unpickler that turns tensors into views and Megatron's classes
into stand-ins and refuses everything else. A rank's state is therefore a small tree, whatever the size of the model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.pickles import ArchivedValues, ArchiveMembers, PickledTensor, StateUnpickler
from megagrow.checkpoint.reading import Files
from megagrow.errors import CheckpointError

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
OPTIMIZER_FILE = "distrib_optim.pt"
_MAX_PICKLE = 256 << 20
_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")


@dataclass(frozen=True)
class ModelRank:
    """A model-parallel rank: its coordinates in the grid of ranks, and its directory."""

    tensor: int
    pipeline: int
    expert: int
    directory: str


@dataclass(frozen=True, eq=False)
class RankFile:
    """A file of a rank: its state as nested dicts and lists in which tensors are views.

    Attributes:
        name: relative to the checkpoint's directory.
        where: full path, for errors.
        state: content of the file.
        members: of the file's archive.
    """

    name: str
    where: str
    state: Any
    members: ArchiveMembers

    def payload(self, view: PickledTensor) -> ArchivedValues:
        """Return the location of a tensor's values in the file."""
        return self.members.payload(view)


def ranks(path: Path, *, pipeline: bool, expert: bool) -> dict[tuple[int, int, int], ModelRank]:
    """Return a checkpoint's ranks by their coordinates (tensor, pipeline, expert).

    Args:
        path: of the checkpoint.
        pipeline, expert: whether directory names contain a pipeline rank and an expert rank.

    Raises:
        CheckpointError: the directories do not form a complete grid.
    """
    found: dict[tuple[int, int, int], ModelRank] = {}
    for entry in sorted(path.iterdir()):
        match = _RANK.match(entry.name)
        if match is None or not entry.is_dir():
            continue
        numbers = [int(number) for number in match.groups() if number is not None]
        if len(numbers) != 1 + pipeline + expert:
            raise CheckpointError(
                f"{entry}: its name has {len(numbers)} numbers, but the arguments specify "
                f"{'pipeline and ' if pipeline else 'no pipeline and '}{'' if expert else 'no '}expert parallelism"
            )
        coordinates = (numbers[0], numbers[1] if pipeline else 0, numbers[-1] if expert else 0)
        found[coordinates] = ModelRank(*coordinates, entry.name)
    grid = [max(each[axis] for each in found) + 1 if found else 0 for axis in range(3)]
    if len(found) != grid[0] * grid[1] * grid[2] or not found:
        raise CheckpointError(f"{path}: {len(found)} mp_rank_* directories, {grid[0]} x {grid[1]} x {grid[2]} expected")
    return found


def first_directory(path: Path) -> str:
    """Return the name of the first rank's directory, which has as many numbers as every other."""
    names = sorted(entry.name for entry in path.iterdir() if _RANK.match(entry.name)) if path.is_dir() else []
    if not names:
        raise CheckpointError(f"{path}: no mp_rank_* directories: not a legacy Megatron checkpoint")
    return names[0]


def model_file(path: Path, directory: str) -> str:
    """Return the name of the file with a rank's model, relative to the checkpoint."""
    for name in MODEL_FILES:
        if (path / directory / name).is_file():
            return f"{directory}/{name}"
    raise CheckpointError(f"{path / directory}: has no {MODEL_FILES[0]}")


def read_state(files: Files, name: str) -> RankFile:
    """Return a file and its state; CheckpointError if it is damaged or unsafe."""
    where, source = str(files.root / name), files.source(name)
    size = (files.root / name).stat().st_size
    with open(files.root / name, "rb") as stream:
        start = stream.read(2)
    if start[:1] == b"\x80":
        raise CheckpointError(f"{where}: written by torch before 1.6: load and save it again with a newer torch")
    members = ArchiveMembers(source, 0, size, where)
    return RankFile(name, where, members.unpickle("data.pkl", StateUnpickler, _MAX_PICKLE), members)


def tensors(state: Any) -> Iterator[tuple[str, PickledTensor]]:
    """Yield the tensors of nested dicts in order, with dotted names; ValueError if a dict occurs twice."""
    seen: set[int] = set()

    def walk(inside: dict[Any, Any], prefix: str) -> Iterator[tuple[str, PickledTensor]]:
        if id(inside) in seen:  # else a small pickle could expand to an endless number of tensors
            raise ValueError(f"{prefix}: a dict that occurs twice")
        seen.add(id(inside))
        for key, value in inside.items():
            if isinstance(value, PickledTensor):
                yield f"{prefix}{key}", value
            elif isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return walk(state, "")
