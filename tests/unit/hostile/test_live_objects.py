"""No pickle of a checkpoint alters anything but what it has made itself."""

import enum
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.formats.torch_dist.index import IndexUnpickler, read_index
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.pickles import ClosedUnpickler, StateUnpickler, TensorUnpickler, to_plain
from megagrow.errors import CheckpointError
from tests.unit.hostile.opcodes import CANARY, PUT_CANARY, attributes, named, plant, slots, text, whole

UNPICKLERS = (IndexUnpickler, StateUnpickler, TensorUnpickler)
NAMES = [(unpickler, *name) for unpickler in UNPICKLERS for name in unpickler(b"").names()]
PARTS = ("parts", "is_absolute", "__defaults__", "__code__", "__call__", "__setstate__", "__class__", "name", CANARY)
"""Attributes whose change would open a guard: of paths, of functions, of classes and of the stand-ins."""

BUILDS = {
    "a dict": attributes(*PARTS) + pickle.BUILD,
    "slots": slots(*PARTS) + pickle.BUILD,
    "slots alone": slots(CANARY) + pickle.BUILD,
    "a dict and slots": attributes(CANARY) + attributes(CANARY) + pickle.TUPLE2 + pickle.BUILD,
    "an item": PUT_CANARY + pickle.SETITEM,
    "items": pickle.MARK + PUT_CANARY + pickle.SETITEMS,
    "a member": pickle.NEWTRUE + pickle.APPEND,
    "members": pickle.MARK + pickle.NEWTRUE + pickle.APPENDS,
    "a member of a set": pickle.MARK + pickle.NEWTRUE + pickle.ADDITEMS,
}
ARGUMENTS = {
    "nothing": pickle.EMPTY_TUPLE,
    "a text": text("x") + pickle.TUPLE1,
    "itself": b"",  # the name's own stand-in
    "a list": pickle.EMPTY_LIST + pickle.TUPLE1,
    "many": pickle.MARK + pickle.NONE * 500 + pickle.TUPLE,
    "no tuple": pickle.NONE,
}
CALLS = {"call": pickle.REDUCE, "new": pickle.NEWOBJ, "new by keyword": attributes("x") + pickle.NEWOBJ_EX}


def attacks(name: bytes) -> Iterator[bytes]:
    """All opcodes by which a pickle could alter what a name is replaced by, or what a call of it returns."""
    yield from (name + build for build in BUILDS.values())
    for call in CALLS.values():
        for argument in ARGUMENTS.values():
            made = name + (argument or name + pickle.TUPLE1) + call
            yield made
            yield from (made + build for build in BUILDS.values())


def state_of_process() -> dict[str, Any]:
    """Names and identities of all that a pickle could reach by a name, if names were imported."""
    found: dict[str, Any] = {}
    wanted = ("megagrow", "pathlib", "collections", "enum", "pickle", "builtins", "argparse", "signal", "copyreg")
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in wanted}
    modules |= {name: sys.modules[name] for name in ("torch._utils", "torch._tensor", "torch.serialization")}
    for module_name, module in sorted(modules.items()):
        for name, value in list(vars(module).items()):
            place = f"{module_name}.{name}"
            found[place] = id(value)
            if isinstance(value, type):
                found |= {f"{place}.{key}": id(each) for key, each in vars(value).items() if key not in UNSTEADY}
            if isinstance(value, type) and issubclass(value, enum.Enum):
                found |= {f"{place}.{member.name}": sorted(vars(member)) for member in value}
            if isinstance(value, types.FunctionType):
                found[f"{place}()"] = (id(value.__code__), repr(value.__defaults__), sorted(value.__dict__))
    return found


UNSTEADY = {"_abc_impl", "__annotations__", "__weakref__"}


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in {**before, **after} if name in before and before[name] != after.get(name)]


def load_all(unpickler: type[ClosedUnpickler], code: bytes, file: Path) -> None:
    """Give the opcodes to the reader that uses the unpickler; it may refuse them or ignore them."""
    try:
        if unpickler is IndexUnpickler:
            file.write_bytes(whole(code))
            read_index(file)
        else:
            to_plain(unpickler(whole(code)).load())
    except CheckpointError as error:
        assert "\n" not in str(error)
    except Exception:
        assert unpickler is not IndexUnpickler  # for the others, `ArchiveMembers.unpickle` makes one line of anything


# issue 12: C10
def test_no_name_on_the_allow_lists_leads_to_anything_that_lives(tmp_path: Path, pristine: Path) -> None:
    assert len(NAMES) > 90
    TorchDistReader(pristine).common()  # imports what it imports
    before = state_of_process()
    for unpickler, module, name in NAMES:
        for code in attacks(named(module, name)):
            load_all(unpickler, code, tmp_path / ".metadata")
    assert difference(before, state_of_process()) == []
    classes = [value for module in list(sys.modules.values()) for value in list(vars(module).values())]
    assert not [value for value in classes if isinstance(value, type) and CANARY in vars(value)]
    assert TorchDistReader(pristine).common()["iteration"] == 10


# issue 12: C10
@pytest.mark.parametrize(("unpickler", "module", "name"), NAMES)
def test_what_a_name_is_replaced_by_is_made_for_one_reading(
    unpickler: type[ClosedUnpickler], module: str, name: str
) -> None:
    first, second = (unpickler(whole(named(module, name))).load() for _ in range(2))
    assert first is not second
    for build in ("a dict", "slots", "slots alone", "a dict and slots"):
        with pytest.raises(CheckpointError, match="would change a class, a function or a type"):
            unpickler(whole(named(module, name) + BUILDS[build])).load()
    with pytest.raises(CheckpointError if isinstance(first, type) else (CheckpointError, AttributeError)):
        setattr(first, CANARY, True)


# issue 12: C10
def test_the_snapshot_notices_what_the_old_unpickler_allowed() -> None:
    class Open(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return {"Pure": sys.modules["pathlib"].PurePosixPath}[name]

    import io
    import pathlib

    before = state_of_process()
    Open(io.BytesIO(whole(named("pathlib", "Pure") + BUILDS["slots alone"]))).load()
    assert f"pathlib.PurePosixPath.{CANARY}" in set(state_of_process()) - set(before)
    delattr(pathlib.PurePosixPath, CANARY)


def outside(path: Path, tmp_path: Path) -> Path:
    """Move the weights out of the checkpoint, and let the index name them there; return that file."""
    secret = tmp_path / "elsewhere" / "secret"
    secret.parent.mkdir()
    shutil.move(path / "__0_0.distcp", secret)
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(content.replace(text("__0_0.distcp"), text("../elsewhere/secret")))
    return secret


# issue 12: C10
@pytest.mark.parametrize("file", [".metadata", "common.pt"])
@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_a_pickle_does_not_open_the_guard_against_files_outside(
    path: Path, tmp_path: Path, one_line: Callable[..., str], file: str, verb: str
) -> None:
    """Before, `parts` and `is_absolute` of the real class were replaced, and the file outside was read."""
    secret = outside(path, tmp_path)
    kept = secret.read_bytes()
    for name in ("PurePosixPath", "PosixPath"):
        plant(path, file, named("pathlib", name) + pickle.NONE + EMPTY_PARTS + pickle.TUPLE2 + pickle.BUILD)
        target = [tmp_path / "target", "parallel.tensor_model_parallel_size=2"] if verb == "convert" else []
        assert "would change a class" in one_line(verb, path, *target) or file == "common.pt"
    assert secret.read_bytes() == kept and not (tmp_path / "target" / "iter_0000010").exists()


EMPTY_PARTS = pickle.EMPTY_DICT + text("parts") + pickle.EMPTY_TUPLE + pickle.SETITEM


# issue 12: C10
def test_a_file_outside_is_refused_by_itself(path: Path, tmp_path: Path, one_line: Callable[..., str]) -> None:
    outside(path, tmp_path)
    assert "refused: points outside its directory" in one_line("inspect", path)


# issue 12: C10
def test_types_are_not_shared_with_a_pickle(path: Path, one_line: Callable[..., str]) -> None:
    plant(path, "common.pt", named("torch", "float32") + attributes("_value_") + pickle.BUILD)
    assert "common.pt: refused: it would change a class, a function or a type" in one_line("inspect", path)
