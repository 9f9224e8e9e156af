"""Paths as users write them: `~` is expanded, `$` is refused, in family.yaml and on the command line alike.

A path that only a shell would understand must not become a directory of that name. Variables are not expanded, because
a family.yaml is read on several machines, where they may have other values or none.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def expand_path(value: Any) -> Any:
    """Return a path or a text with `~` expanded; other types are returned as they are.

    Raises:
        ValueError: it has a `$`, or begins with the name of a user that does not exist.
    """
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if "$" in text:
        raise ValueError(
            f"{text!r} has a $, and variables are not expanded here: write the path out, or let your shell expand it "
            "in an override on the command line"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(
            f"{text!r}: there is no user {expanded.partition('/')[0][1:]!r} here; write ./~ for such a name"
        )
    return type(value)(expanded)


def expand_users(tree: Any) -> Any:
    """Return plain JSON in which each text that begins with `~/` is expanded: older versions recorded `~` itself."""
    if isinstance(tree, dict):
        return {key: expand_users(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand_users(value) for value in tree]
    return os.path.expanduser(tree) if isinstance(tree, str) and tree.startswith("~/") else tree


UserPath = Annotated[Path, BeforeValidator(expand_path)]
UserText = Annotated[str, BeforeValidator(expand_path)]
"""A path, or a glob, that is kept as text."""


def reads_directory(pattern: str, directory: Path, inside: Iterable[str]) -> bool:
    """Whether a path or glob of a corpus would read files in a directory; those in hidden directories are not read.

    Args:
        pattern: a file, a directory that is read with all directories in it, or a glob of files and directories.
        directory: the directory, which need not exist.
        inside: names of files and directories that are, or will be, in it.
    """
    parts = Path(os.path.abspath(pattern)).parts
    plain = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    parts = (*Path(os.path.realpath(Path(*parts[:plain]))).parts, *parts[plain:])
    below = Path(os.path.realpath(directory)).parts
    for number, part in enumerate(parts):
        if part == "**":
            return not _has_hidden(below[number:])
        if number == len(below):  # the rest of the pattern is matched in the directory
            return any(_matches(name, part) for name in inside)
        if not _matches(below[number], part):
            return False
    return not _has_hidden(below[len(parts) :])  # the pattern is the directory, or one that it is in


def _matches(name: str, pattern: str) -> bool:
    if not glob.has_magic(pattern):
        return name == pattern
    return fnmatchcase(name, pattern) and (not name.startswith(".") or pattern.startswith("."))


def _has_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)
