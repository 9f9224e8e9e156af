"""What README and docs name exists: files, links, make targets, verbs and their flags."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs.package_imports import ROOT

PAGES = [
    path.relative_to(ROOT)
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").rglob("*.md")])
]
TOP = sorted(path.name for path in ROOT.iterdir() if not path.name.startswith(".")) + [".ci"]
OUTPUTS = {"runs", "build", "dist", "wandb"}  # what commands write: not in a fresh clone

_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MAKE = re.compile(r"(?:^|[\s;&|`])make ((?:[a-z]+[ \t]*)+)", re.MULTILINE)
_VERB = re.compile(r"(?:^|[\s;&|/])megagrow ([a-z][a-z-]*)((?:[^\n|;&#\\]|\\\n)*)", re.MULTILINE)
_FLAG = re.compile(r"(?<!\S)(--[a-z][a-z-]*)")
_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")


def code_of(text: str) -> list[str]:
    """The parts of a page that are set as code: fenced blocks, then spans of the rest."""
    return _FENCE.findall(text) + _SPAN.findall(_FENCE.sub("", text))


def commands_of(text: str) -> list[str]:
    """The same without shell comments."""
    return [_COMMENT.sub("", code) for code in code_of(text)]


def links_of(text: str) -> list[str]:
    """Targets of links into the repository, without anchors."""
    targets = [target.partition("#")[0] for target in _LINK.findall(_FENCE.sub("", text))]
    return [target for target in targets if target and ":" not in target]


def paths_of(text: str) -> list[str]:
    """Words in code that read as paths from the root of the repository."""
    words = [word.strip(",;()'\"") for code in code_of(text) for word in code.split()]
    return [word for word in words if _PATH.fullmatch(word) and _starts_in_repository(word)]


def _starts_in_repository(word: str) -> bool:
    first, slash, _ = word.partition("/")
    known = bool(slash) and first in {*TOP, "megagrow", "docs", "examples", "tests", "tools", "docker", "schema"}
    return (known and first not in OUTPUTS) or (not slash and word.endswith((".md", ".cfg", ".toml")))


def make_targets_of(text: str) -> set[str]:
    """Targets of `make` in code."""
    return {target for code in commands_of(text) for found in _MAKE.findall(code) for target in found.split()}


def verbs_of(text: str) -> list[tuple[str, set[str]]]:
    """(verb, flags) of every `megagrow VERB` in code."""
    return [(verb, set(_FLAG.findall(rest))) for code in commands_of(text) for verb, rest in _VERB.findall(code)]


@functools.cache
def help_of(*verb: str) -> str:
    """What `megagrow [VERB] --help` prints, wide enough not to be cut."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    answer = subprocess.run(
        [sys.executable, "-m", "megagrow", *verb, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, f"megagrow {' '.join(verb)} --help: {answer.stderr or answer.stdout}"
    return answer.stdout


def _text(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _exists(path: Path) -> bool:
    return any(path.parent.glob(path.name)) if "*" in path.name else path.exists()


def test_there_are_pages():
    assert {Path("README.md"), Path("CONTRIBUTING.md"), Path("docs/architecture.md")} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    assert [link for link in links_of(_text(page)) if not (ROOT / page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_exist(page):
    near = (ROOT, ROOT / page.parent)
    missing = [path for path in paths_of(_text(page)) if not any(_exists(base / path) for base in near)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_exist(page):
    known = set(re.findall(r"^([a-z]+):", _text(Path("Makefile")), re.MULTILINE))
    assert known and make_targets_of(_text(page)) <= known


@pytest.mark.parametrize("page", [page for page in PAGES if verbs_of(_text(page))], ids=str)
def test_verbs_and_their_flags_exist(page):
    for verb, flags in verbs_of(_text(page)):
        assert re.search(rf"^\W*{verb}\s", help_of(), re.MULTILINE), f"{page}: no verb megagrow {verb}"
        known = set(_FLAG.findall(help_of(verb).replace(",", " ")))
        assert flags <= known, f"{page}: megagrow {verb} has no {', '.join(sorted(flags - known))}"


def test_what_a_page_names_is_found():
    page = "Say `make demo`, see [a](docs/a.md#b) and [c](https://c.d).\n\n```\nmake test lint\n"
    page += (
        "megagrow plan examples/no.yaml --json  # prints\n.venv/bin/megagrow run x\n```\nmegagrow grows `docs/*.md`."
    )
    assert make_targets_of(page) == {"demo", "test", "lint"}
    assert links_of(page) == ["docs/a.md"]
    assert paths_of(page) == ["examples/no.yaml", "docs/*.md"]
    assert verbs_of(page) == [("plan", {"--json"}), ("run", set())]
