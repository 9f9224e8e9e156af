"""The rules of the house as tests: who may import whom, on both levels, and how large files and folders may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.docs import rooms_picture
from tools.docs.package_imports import (
    ROOT,
    Import,
    cycles,
    defining_module,
    import_graph,
    imports,
    module_name,
    modules,
    python_files,
    reachable,
    room_of,
)

# Room -> the rooms that it may import, besides itself and `errors`; `growth.maps` is that sub-room alone. The order
# is the order of the data: a room imports only rooms above it.
ROOMS: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "extras": set(),
    "files": set(),
    "parent_death": set(),
    "slurm_step": set(),
    "log": set(),
    "tracker": set(),
    "records": {"files"},
    "config": {"tracker"},
    "plan": {"config"},
    "history": {"config", "plan", "files"},
    "growth": {"config", "plan"},
    "checkpoint": {"config", "history", "growth.maps", "growth.values", "log", "files", "tracker"},
    "convert": {
        "config",
        "history",
        "growth",
        "checkpoint",
        "records",
        "log",
        "files",
        "parent_death",
        "slurm_step",
        "tracker",
        "extras",
    },
    "model": {"config"},
    "runtime": {"log", "parent_death", "slurm_step"},
    "data": {"config", "log", "files", "extras"},
    "training": {"config", "plan", "history", "model", "runtime", "data", "checkpoint", "records", "log", "files"}
    | {"parent_death", "slurm_step"},
    "evaluate": {"config", "plan", "growth.maps", "growth.values", "model", "runtime", "data", "checkpoint", "records"},
    "launch": {
        "config",
        "plan",
        "history",
        "records",
        "log",
        "files",
        "parent_death",
        "slurm_step",
        "tracker",
    },
    "report": {"records", "plan", "history", "config", "files", "extras"},
    "cli": {
        "extras",
        "log",
        "records",
        "config",
        "plan",
        "history",
        "growth",
        "checkpoint",
        "convert",
        "model",
        "runtime",
        "data",
    }
    | {"training", "evaluate", "launch", "report", "files", "slurm_step"},
    "__main__": {"cli"},
}
# Room -> its sub-rooms and files, in order: each imports only those before it.
SUB_ROOMS: dict[str, list[str]] = {
    "history": ["lock", "record", "store", "rule"],
    "growth": ["maps", "operators", "values"],
    "checkpoint": ["index", "directory", "pickles", "reading", "tensors", "formats", "proof", "live"],
    "checkpoint.formats": ["megatron_common", "torch_dist", "legacy", "huggingface", "open"],
    "convert": ["plan", "make", "targets", "early", "work", "run"],
    "cli": ["arguments", "output", "stages", "family", "checkpoint", "main"],
}
# What must not be reached, through whatever other file: a direct import is not the only way to depend on something.
NEVER_REACHED = {
    "checkpoint": {"convert", "growth.operators"},
    "growth.maps": {"growth.operators", "growth.values"},
    "convert": {"training", "evaluate", "launch", "report", "cli"},
}
TORCH_ROOMS = {"growth", "checkpoint", "convert", "model", "runtime", "data", "training", "evaluate"}
MEGATRON_ROOMS = {"model", "runtime", "data", "training", "evaluate", "checkpoint.live"}
CLI_TOP_LEVEL = {"extras", "cli", "errors", "log", "records", "config", "slurm_step", ""}
OPTIONAL = {
    "apex",
    "transformer_engine",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm_eval",
    "pyarrow",
    "zstandard",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

PACKAGE = python_files("megagrow")
ALL = [*PACKAGE, *python_files("tests", "tools"), Path("setup.py")]


def broken_edges(path: Path, source: str) -> list[str]:
    """What a file of megagrow imports and may not."""
    module = module_name(path)
    room = room_of(module)
    if room not in ROOMS:
        return [f"{path}: the room {room!r} is not in the table of {Path(__file__).name}"]
    found = [(edge, _reason(module, edge)) for edge in imports(source, path)]
    return [f"{path}:{edge.line}: imports {edge.module}: {reason}" for edge, reason in found if reason]


def _reason(module: str, edge: Import) -> str | None:
    room = room_of(module)
    if edge.top == "megagrow":
        return _reason_inside(module, edge)
    if edge.top == "torch" and room not in TORCH_ROOMS:
        return f"{room or 'the package'} must work without torch"
    if edge.top == "megatron" and not any(_is_in(module, allowed) for allowed in MEGATRON_ROOMS):
        return "megatron may be imported in " + ", ".join(sorted(MEGATRON_ROOMS))
    if edge.top in OPTIONAL and not (edge.lazy or edge.guarded):
        return "an optional package is imported in a function or in a try"
    return None


def _reason_inside(module: str, edge: Import) -> str | None:
    room, other = room_of(module), room_of(edge.module)
    other = other if other in ROOMS else ""  # `from megagrow import __version__`
    if room == "cli" and not (edge.lazy or edge.typing_only) and other not in CLI_TOP_LEVEL:
        return "a verb imports its rooms inside its function, so that --help stays quick"
    if other == room:
        return _reason_between_sub_rooms(module, edge)
    if other in ("errors", "") or any(_is_in(edge.module, allowed) for allowed in ROOMS[room]):
        return None
    return f"{room or 'the package'} may import only {', '.join(sorted(ROOMS[room])) or 'errors'}"


def _reason_between_sub_rooms(module: str, edge: Import) -> str | None:
    """Why a file may not import another of its own room: the other's sub-room comes later in the order."""
    for room, order in SUB_ROOMS.items():
        here, there = _part(module, room), _part(edge.module, room)
        if here in order and there in order and order.index(there) > order.index(here):
            return f"{room}/{here} comes before {there}, so it may import only {', '.join(order[: order.index(here)])}"
    return None


def _is_in(module: str, room: str) -> bool:
    """Whether a module is a room or sub-room, or inside it."""
    return f"{module}.".startswith(f"megagrow.{room}.")


def _part(module: str, room: str) -> str:
    """The sub-room, or file, of a room that a module is in; empty outside the room."""
    return module.removeprefix(f"megagrow.{room}.").split(".")[0] if _is_in(module, room) else ""


def long_functions(path: Path, source: str) -> list[str]:
    """Functions with more lines than allowed; docstrings do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return found


def global_statements(path: Path, source: str) -> list[str]:
    """Functions that rebind a name of their module."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Global)]
    return [f"{path}:{node.lineno}: global {', '.join(node.names)}" for node in nodes]


def _read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_package_is_found():
    assert {"config", "errors", "records"} <= {room_of(module_name(path)) for path in PACKAGE}


def test_rooms_import_only_what_they_may():
    assert [line for path in PACKAGE for line in broken_edges(path, _read(path))] == []


def test_a_room_comes_after_all_that_it_may_import():
    order = list(ROOMS)
    later = [(room, other) for room, others in ROOMS.items() for other in others
             if order.index(other.split(".")[0]) > order.index(room)]  # fmt: skip
    assert later == []


def test_every_sub_room_is_in_the_order_of_its_room():
    for room, order in SUB_ROOMS.items():
        folder = ROOT / "megagrow" / room.replace(".", "/")
        found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        assert found - {"__init__"} == set(order)


def test_no_files_import_each_other_in_a_loop():
    assert cycles(import_graph()) == []


@pytest.mark.parametrize("room", NEVER_REACHED)
def test_what_must_not_be_reached_is_not_reached_through_others(room):
    graph = import_graph()
    found = [
        f"{module} reaches {other} through {through}"
        for module in graph
        if _is_in(module, room)
        for other, through in reachable(graph, module).items()
        if any(_is_in(other, forbidden) for forbidden in NEVER_REACHED[room])
    ]
    assert found == []


def test_the_rules_see_a_loop_and_a_detour():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert cycles(graph) == [["b", "c"]]
    assert reachable(graph, "a") == {"b": "a", "c": "b"} or reachable(graph, "a")["c"] == "b"
    assert defining_module("x.y.name", ["x", "x.y"]) == "x.y" and defining_module("z.name", ["x"]) is None


def undeclared(module: str, edges: list[Import]) -> Iterator[str]:
    """Imports by which a file reaches into a sub-room that it is not in, past what its `__init__` declares."""
    for edge in edges:
        target = defining_module(edge.module)
        for sub_room in _sub_rooms_of(edge.module):
            if f"{module}.".startswith(f"{sub_room}.") or target is None:
                continue
            name = edge.module.removeprefix(f"{sub_room}.").split(".")[0]
            if edge.module != sub_room and name not in declared(sub_room):
                yield f"{module}:{edge.line}: imports {edge.module}, which {sub_room} does not declare"


def _sub_rooms_of(module: str) -> list[str]:
    """The sub-rooms, outer first, that an imported name is in."""
    names = [f"megagrow.{room}.{part}" for room, order in SUB_ROOMS.items() for part in order]
    folders = [name for name in names if (ROOT / name.replace(".", "/")).is_dir()]
    return [folder for folder in folders if f"{module}.".startswith(f"{folder}.")]


def declared(package: str) -> set[str]:
    """The names in a package's `__all__`, and the sub-rooms in it, which declare their own."""
    tree = ast.parse((ROOT / modules()[package]).read_text(encoding="utf-8"))
    lists = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    inner = SUB_ROOMS.get(package.removeprefix("megagrow."), [])
    return {name for value in lists for name in ast.literal_eval(value)} | set(inner)


def test_outsiders_use_what_a_sub_room_declares():
    tools = python_files("tools")
    found = [line for path in [*PACKAGE, *tools] for line in undeclared(module_name(path), imports(_read(path), path))]
    assert found == []


def test_a_name_that_is_not_declared_is_named():
    source = "from megagrow.checkpoint.index.box import Box\nfrom megagrow.checkpoint.index import DType, nothing"
    found = list(undeclared("megagrow.training.x", imports(source, Path("megagrow/training/x.py"))))
    assert [line.split(", which")[0].split("imports ")[1] for line in found] == [
        "megagrow.checkpoint.index.box.Box",
        "megagrow.checkpoint.index.nothing",
    ]


def test_tools_do_not_import_tests():
    found = [f"{path}: {edge.module}" for path in python_files("tools") for edge in imports(_read(path), path)
             if edge.top == "tests"]  # fmt: skip
    assert found == []


def test_the_picture_shows_the_imports_as_they_are():
    assert rooms_picture.PICTURE.read_text(encoding="utf-8") == rooms_picture.draw(), (
        "python -m tools.docs.rooms_picture"
    )


def test_files_are_short():
    lengths = {path: _read(path).count("\n") for path in ALL}
    assert {str(path): lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short():
    assert [line for path in ALL for line in long_functions(path, _read(path))] == []


def test_no_drawer_files():
    assert [str(path) for path in ALL if path.name in ("utils.py", "common.py", "helpers.py", "misc.py")] == []


def test_no_global_statement():
    assert [line for path in PACKAGE for line in global_statements(path, _read(path))] == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("megagrow/config/a.py", "import torch", "without torch"),
        ("megagrow/plan/a.py", "def f():\n    from torch import nn", "without torch"),
        ("megagrow/cli/a.py", "def f():\n    import importlib\n    importlib.import_module('torch')", "without torch"),
        ("megagrow/growth/a.py", "import megatron.core", "megatron may be imported in"),
        ("megagrow/checkpoint/proof/a.py", "from megatron.core import x", "megatron may be imported in"),
        ("megagrow/model/a.py", "from megagrow.training import loop", "model may import only config"),
        ("megagrow/model/a.py", "from megagrow import plan", "model may import only config"),
        ("megagrow/model/a.py", "from ..plan import budget", "model may import only config"),
        ("megagrow/config/a.py", "import megagrow.plan", "config may import only tracker"),
        (
            "megagrow/checkpoint/index/a.py",
            "from megagrow.checkpoint.formats import b",
            "checkpoint/index comes before formats",
        ),
        ("megagrow/checkpoint/proof/a.py", "from megagrow.growth.operators import b", "checkpoint may import only"),
        ("megagrow/checkpoint/index/a.py", "from megagrow.convert import b", "checkpoint may import only"),
        ("megagrow/cli/a.py", "from megagrow.plan import family_plan", "inside its function"),
        ("megagrow/runtime/a.py", "from apex.optimizers import FusedAdam", "optional package"),
        ("megagrow/runtime/a.py", "try:\n    pass\nfinally:\n    import apex", "optional package"),
        ("megagrow/drawer/a.py", "", "not in the table"),
    ],
)
def test_a_wrong_import_is_named(path, source, expected):
    (line,) = broken_edges(Path(path), source)
    assert path in line and expected in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megagrow/plan/a.py", "from megagrow import __version__\nfrom megagrow.errors import ConfigError"),
        ("megagrow/plan/a.py", "from megagrow.plan.budget import b\nfrom . import flops\nimport megagrow.config as c"),
        ("megagrow/checkpoint/live/a.py", "from megatron.core import dist_checkpointing"),
        ("megagrow/cli/a.py", "from megagrow.config import load\ndef f():\n    from megagrow.training import run"),
        ("megagrow/runtime/a.py", "try:\n    import apex\nexcept ImportError:\n    apex = None"),
    ],
)
def test_a_right_import_passes(path, source):
    assert broken_edges(Path(path), source) == []


def test_a_long_function_is_named_and_its_docstring_is_free():
    body = "    x = 1\n" * 60
    docstring = '    """One.\n\n    Two.\n    """\n'
    assert long_functions(Path("a.py"), "def f():\n" + docstring + body[10:]) == []
    assert len(long_functions(Path("a.py"), "def f():\n" + body)) == 1


def test_a_global_statement_is_named():
    assert global_statements(Path("a.py"), "x = 1\ndef f():\n    global x\n    x = 2") == ["a.py:3: global x"]


FILES_AND_RANKS = {"os", "io", "pathlib", "shutil", "tempfile", "json", "pickle"}


@pytest.mark.parametrize("path", [path for path in PACKAGE if "growth" in path.parts], ids=str)
def test_growth_knows_neither_files_nor_ranks(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    opens = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "open"]
    found = [edge.module for edge in imports(source, path) if edge.top in FILES_AND_RANKS]
    found += [edge.module for edge in imports(source, path) if edge.module.startswith("torch.distributed")]
    assert not opens and not found
