"""The package as text: files, rooms and imports, read with `ast` and never imported."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Import:
    """One imported module. `lazy`: inside a function; `guarded`: in a try, or for a type checker only."""

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
    """Every import of a file, wherever it stands; `from a import b` counts as a.b, importlib calls as well."""
    return list(_walk(ast.parse(source), path, lazy=False, guarded=False, typing_only=False))


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
