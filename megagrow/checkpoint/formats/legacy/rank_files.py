"""The files of a legacy checkpoint, one directory for each model-parallel rank, read without loading a tensor.

Each holds one big torch.save archive: a pickle of nested dicts in which a tensor is a few numbers that say where its
values lie in the archive. The pickle alone is read, by an unpickler that makes views of tensors and stand-ins of
Megatron's own classes and knows nothing else; so a rank's state is a small tree, whatever the size of the model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.megatron_common import StateUnpickler
from megagrow.checkpoint.pickles import Members, Payload, View
from megagrow.checkpoint.reading import Files
from megagrow.errors import CheckpointError

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
OPTIMIZER_FILE = "distrib_optim.pt"
_MAX_PICKLE = 256 << 20
_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")


@dataclass(frozen=True)
class ModelRank:
    """A model-parallel rank: its place in the grid, and its directory."""

    tensor: int
    pipeline: int
    expert: int
    directory: str


@dataclass(frozen=True, eq=False)
class Archive:
    """A file's state: nested dicts and lists in which tensors are views.

    Attributes:
        name: relative to the checkpoint's directory.
        where: names it in errors.
        state: what it holds.
    """

    name: str
    where: str
    state: Any
    members: Members

    def payload(self, view: View) -> Payload:
        """Where a tensor's values lie in the file."""
        return self.members.payload(view)


def ranks(path: Path, *, pipeline: bool, expert: bool) -> dict[tuple[int, int, int], ModelRank]:
    """Return a checkpoint's ranks by their place (tensor, pipeline, expert).

    Args:
        path: of the checkpoint.
        pipeline, expert: whether the second and the third number of a directory's name are there.

    Raises:
        CheckpointError: the directories are no whole grid.
    """
    found: dict[tuple[int, int, int], ModelRank] = {}
    for entry in sorted(path.iterdir()):
        match = _RANK.match(entry.name)
        if match is None or not entry.is_dir():
            continue
        numbers = [int(number) for number in match.groups() if number is not None]
        if len(numbers) != 1 + pipeline + expert:
            raise CheckpointError(
                f"{entry}: a name with {len(numbers)} numbers, where its arguments have "
                f"{'pipeline and ' if pipeline else 'no pipeline and '}{'' if expert else 'no '}expert parallelism"
            )
        place = (numbers[0], numbers[1] if pipeline else 0, numbers[-1] if expert else 0)
        found[place] = ModelRank(*place, entry.name)
    grid = [max(place[axis] for place in found) + 1 if found else 0 for axis in range(3)]
    if len(found) != grid[0] * grid[1] * grid[2] or not found:
        raise CheckpointError(f"{path}: {len(found)} mp_rank_* directories, {grid[0]} x {grid[1]} x {grid[2]} expected")
    return found


def first_directory(path: Path) -> str:
    """Directory of the first rank, whose name has as many numbers as the names of all."""
    names = sorted(entry.name for entry in path.iterdir() if _RANK.match(entry.name)) if path.is_dir() else []
    if not names:
        raise CheckpointError(f"{path}: no mp_rank_* directories: not a legacy Megatron checkpoint")
    return names[0]


def model_file(path: Path, directory: str) -> str:
    """Name of the file with a rank's model, relative to the checkpoint."""
    for name in MODEL_FILES:
        if (path / directory / name).is_file():
            return f"{directory}/{name}"
    raise CheckpointError(f"{path / directory}: has no {MODEL_FILES[0]}")


def read_state(files: Files, name: str) -> Archive:
    """Return a file's state; CheckpointError if it is damaged or would import something foreign."""
    where = str(files.root / name)
    handle = files.handle(name)
    size = (files.root / name).stat().st_size
    with open(files.root / name, "rb") as stream:
        start = stream.read(2)
    if start[:1] == b"\x80":
        raise CheckpointError(f"{where}: written by torch before 1.6: load it there and torch.save it with a newer one")
    members = Members(handle, 0, size, where)
    return Archive(name, where, members.unpickle("data.pkl", StateUnpickler, _MAX_PICKLE), members)


def tensors(state: Any) -> Iterator[tuple[str, View]]:
    """Yield the tensors of nested dicts, names joined by dots, in order; ValueError where a dict is there twice."""
    seen: set[int] = set()

    def walk(inside: dict[Any, Any], prefix: str) -> Iterator[tuple[str, View]]:
        if id(inside) in seen:  # or a small pickle could hold more tensors than there is time for
            raise ValueError(f"{prefix}: a dict that is there twice")
        seen.add(id(inside))
        for key, value in inside.items():
            if isinstance(value, View):
                yield f"{prefix}{key}", value
            elif isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return walk(state, "")
