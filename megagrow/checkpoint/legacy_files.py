"""The files of a legacy checkpoint, one directory for each model-parallel rank, read without loading a tensor.

Each holds one big torch.save archive: a pickle of nested dicts in which a tensor is a few numbers that say where its
values lie in the archive. The pickle alone is read, by an unpickler that makes views of tensors and stand-ins of
Megatron's own classes and knows nothing else; so a rank's state is a small tree, whatever the size of the model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.archive import Members, Payload, TensorUnpickler, View
from megagrow.checkpoint.dtypes import DType
from megagrow.checkpoint.files import Files
from megagrow.checkpoint.safe_pickle import stand_in, stand_in_for
from megagrow.errors import CheckpointError

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
OPTIMIZER_FILE = "distrib_optim.pt"
_MAX_PICKLE = 256 << 20
_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
_DTYPES = frozenset(
    ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float")
)
_OPAQUE = frozenset(
    (
        ("torch", "device"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
    )
)


@dataclass(frozen=True)
class Rank:
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


class StateUnpickler(TensorUnpickler):
    """An unpickler of whole states: tensors become views, Megatron's own objects stand-ins, and no more is known."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; CheckpointError for any that no state needs."""
        if (module, name) in _REBUILD:
            return _REBUILD[module, name]
        if module == "torch" and name in _DTYPES:
            return DType("float32" if name == "float" else name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if name == "set" and module in ("builtins", "__builtin__"):
            return set
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) == ("collections", "defaultdict"):
            return type("Defaults", (_Defaults,), {})
        if name in ("dict", "list", "int", "float") and module in ("builtins", "__builtin__"):
            return stand_in(name)  # what such a dict would call
        known = stand_in_for(module, name)
        if known is None and ((module, name) in _OPAQUE or re.fullmatch(r"megatron\.(\w+\.)*enums", module)):
            known = stand_in(f"{module}.{name}")
        return known or super().find_class(module, name)


class _Defaults(dict[Any, Any]):
    """Stands for a defaultdict, whatever it defaults to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How a pickle of protocol 2 writes bytes."""
    return text.encode("latin1")


def _rebuild_typed(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with Python attributes: the tensor."""
    return rebuild(*arguments)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    """A parameter: its tensor."""
    return data


_REBUILD: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}


def ranks(path: Path, *, pipeline: bool, expert: bool) -> dict[tuple[int, int, int], Rank]:
    """Return a checkpoint's ranks by their place (tensor, pipeline, expert).

    Args:
        path: of the checkpoint.
        pipeline, expert: whether the second and the third number of a directory's name are there.

    Raises:
        CheckpointError: the directories are no whole grid.
    """
    found: dict[tuple[int, int, int], Rank] = {}
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
        found[place] = Rank(*place, entry.name)
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
