"""How much a folder may hold: a stranger should see at once what is in it."""

from collections.abc import Iterator
from pathlib import Path

from tools.docs.package_imports import ROOT, python_files

MAX_FOLDER_FILES, MAX_FOLDER_LINES, MAX_LINES_OVER_FOLDERS = 14, 2500, 300
# Folder -> why it holds one file only.
ONE_FILE_ALONE: dict[str, str] = {}

ALL = [*python_files("megagrow", "tests", "tools"), Path("setup.py")]


def folder_faults(sizes: dict[Path, int]) -> Iterator[str]:
    """Folders that hold too much, from the lines of each Python file; empty files do not count."""
    folders = {folder for path in sizes for folder in path.parents if folder != Path(".")}
    for folder in sorted(folders):
        own = [lines for path, lines in sizes.items() if path.parent == folder and lines]
        inner = any(folder in path.parent.parents for path in sizes)
        files = [path for path in sizes if path.parent == folder and path.name != "__init__.py"]
        if len(own) > MAX_FOLDER_FILES:
            yield f"{folder}: {len(own)} files, {MAX_FOLDER_FILES} at most"
        if sum(own) > MAX_FOLDER_LINES:
            yield f"{folder}: {sum(own)} lines, {MAX_FOLDER_LINES} at most"
        if inner and sum(own) > MAX_LINES_OVER_FOLDERS:
            yield f"{folder}: {sum(own)} lines beside its folders, {MAX_LINES_OVER_FOLDERS} at most"
        if not inner and len(files) == 1 and folder.parts[0] == "megagrow" and str(folder) not in ONE_FILE_ALONE:
            yield f"{folder}: one file alone, without a reason in ONE_FILE_ALONE"


def test_folders_are_small():
    assert list(folder_faults({path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in ALL})) == []


def test_a_folder_that_holds_too_much_is_named():
    many = {Path(f"megagrow/a/{number}.py"): 200 for number in range(15)}
    assert [line.split(": ")[1] for line in folder_faults(many)] == ["15 files, 14 at most", "3000 lines, 2500 at most"]
    beside = {Path("megagrow/a/x.py"): 301, Path("megagrow/a/b/y.py"): 1, Path("megagrow/a/b/z.py"): 1}
    assert list(folder_faults(beside)) == ["megagrow/a: 301 lines beside its folders, 300 at most"]
    assert list(folder_faults({Path("megagrow/a/x.py"): 1})) == [
        "megagrow/a: one file alone, without a reason in ONE_FILE_ALONE"
    ]
