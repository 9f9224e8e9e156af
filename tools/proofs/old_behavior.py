"""Run the tests of issue 12 against an older version's command line, and list the assertions that fail there.

    git worktree add /tmp/old 8e9e14e
    python -m tools.proofs.old_behavior --old /tmp/old --write

A test names the sentence that it holds to in a comment (`issue 12: A1`). Here every `megagrow` command of such a test,
in this process or in one of its own, is run by the older package. A test counts if it passes when this checkout's
package is run in the same way, and fails by an assertion of its own on the older one. It does not count if the older
version could not be asked: it does not know an option or a verb, or a file that the test's fixtures wrote. Tests that
call functions and no command cannot be asked either. Manifests are stripped of what older versions do not know first.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megagrow.config.pipeline import UNEVEN

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "figures" / "old_behavior.md"
TESTS = ("tests/unit", "tests/distributed/survival/test_edits.py")
COMMIT = "8e9e14e"
TREE, ANSWERS = "OLD_BEHAVIOR_TREE", "OLD_BEHAVIOR_ANSWERS"
_MARK, _TEST = re.compile(r"#.*issue 12: ([A-E]\d[A-E0-9, ]*)"), re.compile(r"\s*def (test_\w+)")
_NOT_ASKED = re.compile(
    r"No such option|No such command|Extra inputs are not permitted|ImportError|ModuleNotFoundError|unknown key"
    r"|unexpected keyword"
)
"""What an older version answers to a question that it does not understand."""
_NEW, _NEW_LAYOUT = ("history", "storage"), ("expert_tensor_parallel_size", *UNEVEN)
"""Fields of a manifest that the older version does not know, and those of its layout, which are most often empty."""
_SHOWN = 110


def marked_tests(path: Path) -> dict[str, str]:
    """The sentences of issue 12 that a file's tests name, by the tests' names."""
    found: dict[str, str] = {}
    waiting, inside = "", ""
    for line in path.read_text().splitlines():
        if test := _TEST.match(line):
            inside = test[1]
            if waiting:
                found[inside], waiting = waiting, ""
        elif mark := _MARK.search(line):
            if line.startswith("#"):
                waiting = mark[1].strip()
            else:
                found[inside] = mark[1].strip()
    return found


HEAD = f"""# What the tests of issue 12 find on commit {COMMIT}

`python -m tools.proofs.old_behavior --old DIR --write` made this page. Every command of a test was run by the older
package. *Fails*: by an assertion of the test, which passes when this version is run in the same way. *Passes*: the
older version does that right, too. *Not asked*: it does not know the option, the verb or the file. *No command*: the
test calls functions, or runs ranks.

| sentence | fails | passes | not asked | no command |
|---|---|---|---|---|"""
KINDS = ("fails", "passes", "not asked", "no command")


# As a plugin of pytest: the commands of a test are run by another package

_calls: list[str] = []


def _environment(given: dict[str, str] | None) -> dict[str, str]:
    return {**(os.environ if given is None else given), "PYTHONPATH": os.environ[TREE], "PYTHONSAFEPATH": "1"}


def _strip(value: Any) -> Any:
    """A manifest's content without the fields that came after the older version; an uneven pipeline stays."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key not in _NEW and (key not in _NEW_LAYOUT or each)}
        return {key: _strip(each) for key, each in kept.items()}
    return [_strip(each) for each in value] if isinstance(value, list) else value


def _hash(sums: dict[str, Any], content: bytes) -> str:
    """The hash of a file by the algorithm of an integrity.json."""
    return hashlib.sha256(content).hexdigest() if "sha256" in sums["algorithm"] else xxhash.xxh3_128_hexdigest(content)


def _make_readable(folder: Path) -> None:
    """Let an older version read the sealed checkpoints of a test; one that a test damaged stays as it is."""
    for manifest in folder.rglob("megagrow.json"):
        seal = manifest.with_name("integrity.json")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            sums: dict[str, Any] = {"files": {}, "algorithm": ""}
            if seal.is_file():
                sums = json.loads(seal.read_text())
            before = manifest.read_bytes()
            entry = sums["files"].get("megagrow.json")
            if entry is not None and _hash(sums, before) not in json.dumps(entry):
                continue
            content = json.loads(before)
            after = json.dumps(_strip(content)).encode()
            if json.loads(after) == content:
                continue
            manifest.write_bytes(after)
            if entry is not None:
                entry = json.loads(json.dumps(entry).replace(_hash(sums, before), _hash(sums, after)))
                if isinstance(entry, dict):
                    entry["size"] = len(after)
                sums["files"]["megagrow.json"] = entry
                sums.pop("blocks", None)
                seal.write_text(json.dumps(sums))


def _folder(place: Path) -> Path:
    """The directory that a command's argument stands for: a family's is that of its file."""
    return place if place.is_dir() else place.parent


@pytest.fixture(autouse=True)
def other_package(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every command of a test by the other package."""
    from megagrow.cli import main as entry

    _calls.clear()
    is_old = os.environ[TREE] != str(ROOT)
    started = subprocess.Popen.__init__
    base = Path(request.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]  # private in pytest

    def start(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        words = [str(word) for word in args] if isinstance(args, list | tuple) else []
        if "-m" in words and words[words.index("-m") + 1] == "megagrow":
            options["env"] = _environment(options.get("env"))
            _calls.append(" ".join(words))
            for place in {_folder(Path(word)) for word in words if is_old and Path(word).exists()}:
                if base in place.parents:
                    _make_readable(place)
        started(self, args, *rest, **options)

    def run(*_: Any, **__: Any) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "megagrow", *sys.argv[1:]], capture_output=True, text=True, errors="replace"
        )
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        _calls.append(done.stderr)
        raise SystemExit(done.returncode)

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setattr(entry, "main", run)
    yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the marked tests."""
    names: dict[Path, dict[str, str]] = defaultdict(dict)
    for item in items:
        if item.path not in names:
            names[item.path] = marked_tests(item.path)
    items[:] = [item for item in items if getattr(item, "originalname", "") in names[item.path]]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Write down how a test ended, and by which assertion."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" and report.passed:
        return
    words = str(call.excinfo.value) if call.excinfo else ""
    asserted = call.excinfo is not None and issubclass(call.excinfo.type, AssertionError | pytest.fail.Exception)
    place = getattr(report.longrepr, "reprcrash", None)
    source = ""
    if call.excinfo is not None:
        own = [entry for entry in call.excinfo.traceback if Path(entry.path) == item.path]
        source = " ".join(str(own[-1].statement).split()) if own else str(place)
    answer = {
        "test": item.nodeid, "sentence": marked_tests(item.path)[getattr(item, "originalname", item.name)],
        "outcome": report.outcome, "asserted": asserted and report.when == "call", "calls": len(_calls),
        "asked": not _NOT_ASKED.search(words + "\n".join(_calls)), "statement": source, "words": words[:2000],
    }  # fmt: skip
    with open(os.environ[ANSWERS], "a") as stream:
        stream.write(json.dumps(answer) + "\n")


# As a script


def ask(tree: Path, tests: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """How the marked tests end on a package, by their ids."""
    answers = folder / f"{tree.name}.jsonl"
    answers.unlink(missing_ok=True)
    options = ["-q", "-x", "--maxfail=100000", "-n", "2", "--dist", "loadfile", "-p", "tools.proofs.old_behavior"]
    environment = {**os.environ, TREE: str(tree), ANSWERS: str(answers), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, "--timeout", "120", "-p", "no:cacheprovider", *tests]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
    return {each["test"]: each for each in map(json.loads, answers.read_text().splitlines())}


def page(new: dict[str, dict[str, Any]], old: dict[str, dict[str, Any]]) -> str:
    """The results as a page."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    evidence: dict[str, list[str]] = defaultdict(list)
    for test, answer in sorted(old.items()):
        for sentence in re.findall(r"[A-E]\d+", answer["sentence"]):
            kind = _kind(new.get(test), answer)
            rows[sentence][kind] += 1
            if kind == "fails":
                evidence[sentence].append(f"`{test.rpartition('::')[2][:70]}`: `{answer['statement'][:_SHOWN]}`")
    order = sorted(rows, key=lambda name: (name[0], int(name[1:])))
    table = [f"| {name} | {' | '.join(str(rows[name][kind]) for kind in KINDS)} |" for name in order]
    lists = [f"\n## {name}\n\n" + "\n".join(f"- {line}" for line in evidence[name]) for name in order if evidence[name]]
    return "\n".join([HEAD, *table, *lists]) + "\n"


def _kind(new: dict[str, Any] | None, old: dict[str, Any]) -> str:
    if not old["calls"]:
        return "no command"
    if old["outcome"] == "passed":
        return "passes"
    good = new is not None and new["outcome"] == "passed"
    return "fails" if good and old["asserted"] and old["asked"] else "not asked"


def main() -> None:
    """Ask both versions and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help=f"checkout of commit {COMMIT}")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for the answers of both versions")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    given = parser.parse_args()
    old = ask(given.old.resolve(), given.tests, given.folder)
    new = ask(ROOT, given.tests, given.folder)
    text = page(new, old)
    if given.write:
        PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
