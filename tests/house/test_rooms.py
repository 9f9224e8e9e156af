"""The house rules as tests: who may import whom, and how long a file and a function may be."""

import ast
from pathlib import Path

import pytest

from tests.house.sources import ROOT, Import, imports, module_name, python_files, room_of

# Room -> the rooms that it may import, besides itself and `errors`. The order is the order of the data.
ROOMS: dict[str, set[str]] = {
    "": set(),
    "errors": set(),
    "lifeline": set(),
    "log": set(),
    "tracker": set(),
    "records": set(),
    "config": {"tracker"},
    "plan": {"config"},
    "growth": {"config", "plan"},
    "checkpoint": {"config", "growth", "records", "log", "lifeline", "tracker"},
    "model": {"config"},
    "runtime": {"log", "lifeline"},
    "data": {"config", "log"},
    "training": {"config", "plan", "model", "runtime", "data", "checkpoint", "records", "log", "lifeline"},
    "evaluate": {"config", "model", "runtime", "data", "checkpoint", "records"},
    "launch": {"config", "plan", "records", "log", "lifeline", "tracker"},
    "report": {"records", "plan", "config"},
    "cli": {"log", "records", "config", "plan", "growth", "checkpoint", "model", "runtime", "data", "training"}
    | {"evaluate", "launch", "report"},
    "__main__": {"cli"},
}
TORCH_ROOMS = {"growth", "checkpoint", "model", "runtime", "data", "training", "evaluate"}
MEGATRON_ROOMS = {"model", "runtime", "data", "training", "evaluate"}  # and checkpoint/megatron_*.py
CLI_TOP_LEVEL = {"cli", "errors", "log", "records", "config", ""}
OPTIONAL = {"apex", "transformer_engine", "transformers", "tokenizers", "safetensors", "lm_eval"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60

PACKAGE = python_files("megagrow")
ALL = [*PACKAGE, *python_files("tests", "tools"), Path("setup.py")]


def broken_edges(path: Path, source: str) -> list[str]:
    """What a file of megagrow imports and may not."""
    module = module_name(path)
    room = room_of(module)
    if room not in ROOMS:
        return [f"{path}: the room {room!r} is not in the table of {Path(__file__).name}"]
    found = [(edge, _reason(room, path, edge)) for edge in imports(source, path)]
    return [f"{path}:{edge.line}: imports {edge.module}: {reason}" for edge, reason in found if reason]


def _reason(room: str, path: Path, edge: Import) -> str | None:
    if edge.top == "megagrow":
        return _reason_inside(room, edge)
    if edge.top == "torch" and room not in TORCH_ROOMS:
        return f"{room or 'the package'} must work without torch"
    if edge.top == "megatron" and room not in MEGATRON_ROOMS:
        if room != "checkpoint" or not path.name.startswith("megatron_"):
            return "megatron may be imported in " + ", ".join(sorted(MEGATRON_ROOMS)) + ", checkpoint/megatron_*.py"
    if edge.top in OPTIONAL and not (edge.lazy or edge.guarded):
        return "an optional package is imported in a function or in a try"
    return None


def _reason_inside(room: str, edge: Import) -> str | None:
    other = room_of(edge.module)
    other = other if other in ROOMS else ""  # `from megagrow import __version__`
    if room == "cli" and not (edge.lazy or edge.typing_only) and other not in CLI_TOP_LEVEL:
        return "a verb imports its rooms inside its function, so that --help stays quick"
    if other in (room, "errors", "") or other in ROOMS[room]:
        return None
    return f"{room or 'the package'} may import only {', '.join(sorted(ROOMS[room])) or 'errors'}"


def long_functions(path: Path, source: str) -> list[str]:
    """Functions with more lines than allowed; docstrings do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
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


def test_the_table_of_rooms_has_no_cycle():
    order = list(ROOMS)
    later = [
        (room, other) for room, others in ROOMS.items() for other in others if order.index(other) > order.index(room)
    ]
    assert later == []


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
        ("megagrow/checkpoint/a.py", "from megatron.core import dist_checkpointing", "megatron may be imported in"),
        ("megagrow/model/a.py", "from megagrow.training import loop", "model may import only config"),
        ("megagrow/model/a.py", "from megagrow import plan", "model may import only config"),
        ("megagrow/model/a.py", "from ..plan import budget", "model may import only config"),
        ("megagrow/config/a.py", "import megagrow.plan", "config may import only tracker"),
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
        ("megagrow/checkpoint/megatron_store.py", "from megatron.core import dist_checkpointing"),
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
