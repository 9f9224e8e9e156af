"""The package as text: its files and who imports whom, read with `ast` and never imported.

`tests/house` holds the rules on what this finds; `tools/docs/rooms_picture.py` draws it. An import counts wherever it
is written: at the top, in a function, for a type checker only, or by importlib.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megagrow"


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: dotted name; `from a import b` counts as `a.b`, whether `b` is a module or not.
        line: where it is written.
        lazy: inside a function.
        guarded: in a `try` with handlers, or for a type checker only.
        typing_only: for a type checker only.
    """

    module: str
    line: int
    lazy: bool
    guarded: bool
    typing_only: bool

    @property
    def top(self) -> str:
        """First part of the dotted name."""
        return self.module.split(".")[0]


def python_files(*folders: str) -> list[Path]:
    """Python files under folders of the repository, as paths relative to it."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT) for path in found]


def module_name(path: Path) -> str:
    """`megagrow/plan/budget.py` is megagrow.plan.budget."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room of a module of megagrow; the package itself is the room ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(source: str, path: Path) -> list[Import]:
    """Every import of a file."""
    return list(_walk(ast.parse(source), path, lazy=False, guarded=False, typing_only=False))


@cache
def modules() -> Mapping[str, Path]:
    """The modules of the package and of the tools, by dotted name."""
    return {module_name(path): path for path in python_files(PACKAGE, "tools")}


def defining_module(name: str, known: Iterable[str] | None = None) -> str | None:
    """The module that an imported name is in: the longest known prefix; None for other packages."""
    names = modules() if known is None else set(known)
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in names:
            return prefix
    return None


@cache
def import_graph() -> Mapping[str, frozenset[str]]:
    """Module -> the modules that it imports, over the package."""
    graph = {}
    for module, path in modules().items():
        if module.split(".")[0] == PACKAGE:
            found = {defining_module(edge.module) for edge in imports((ROOT / path).read_text("utf-8"), path)}
            graph[module] = frozenset(name for name in found if name is not None and name != module)
    return graph


def reachable(graph: Mapping[str, Iterable[str]], start: str) -> dict[str, str]:
    """All that a module imports, through others too: each with the module that leads to it."""
    found: dict[str, str] = {}
    waiting = [(start, other) for other in sorted(graph.get(start, ()))]
    while waiting:
        through, module = waiting.pop()
        if module not in found:
            found[module] = through
            waiting += [(module, other) for other in sorted(graph.get(module, ()))]
    return found


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop."""
    reach = {module: set(reachable(graph, module)) for module in graph}
    looped = {module for module in graph if module in reach[module]}
    groups = {frozenset(other for other in looped if other in reach[module] and module in reach[other])
              for module in looped}  # fmt: skip
    return sorted(sorted(group) for group in groups)


def _walk(node: ast.AST, path: Path, *, lazy: bool, guarded: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for module in _imported(child, path):
            yield Import(module, getattr(child, "lineno", 0), lazy, guarded, typing_only)
        checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _walk(
            child,
            path,
            lazy=lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
            guarded=guarded or checked or (isinstance(child, ast.Try) and bool(child.handlers)),
            typing_only=typing_only or checked,
        )


def _imported(node: ast.AST, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute(node, path)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called, argument = ast.unparse(node.func), node.args[0].value
        if called.split(".")[-1] in ("import_module", "__import__") and isinstance(argument, str):
            return [argument]
    return []


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = list(path.parent.parts)[: len(path.parent.parts) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])
