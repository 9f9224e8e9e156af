"""Fill the samples of output in README and docs by running their commands.

    make demo && python -m tools.docs.samples

A sample is a fenced block between `<!-- sample:NAME begin -->` and `<!-- sample:NAME end -->`. Its command is the last
line of the fenced block right above it, which a reader can copy. Most samples read what `make demo` leaves in
runs/demo. A test runs every command on a much shorter demo and compares all but the numbers, so a sample cannot show
output that no longer exists.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_SAMPLE = re.compile(r"<!-- sample:(\S+) begin -->\n```\w*\n(.*?)```\n<!-- sample:\1 end -->", re.DOTALL)
_FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?(?: ?(?:[kMGT]B?|B|%))?(?![\w-])")
_OTHERWISE = {"demo": "megagrow report examples/demo/family.yaml"}
"""Samples whose command a reader does not give himself: `make demo` ends with it."""


@dataclass(frozen=True)
class Sample:
    """A command, and what a page claims that it prints."""

    page: Path
    name: str
    command: str
    output: str


def samples() -> Iterator[Sample]:
    """All samples, in the order of the pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _SAMPLE.finditer(text):
            above = _FENCED.findall(text[: match.start()])[-1].strip().splitlines()[-1]
            command = _OTHERWISE.get(match[1]) or above.partition("  #")[0]
            yield Sample(page, match[1], command, match[2])


def run(command: str, directory: Path, *more: str) -> str:
    """Run `megagrow ...` in a directory with more arguments; return what it prints on standard output.

    Raises:
        RuntimeError: it failed.
    """
    program, *arguments = command.split()
    if program != "megagrow":
        raise RuntimeError(f"{command}: a sample's command begins with megagrow")
    arguments = [str(ROOT / word) if word.startswith("examples/") else word for word in arguments]
    line = [sys.executable, "-m", "megagrow", *arguments, *more]
    done = subprocess.run(line, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr.strip()}")
    return "".join(text.rstrip() + "\n" for text in done.stdout.strip("\n").splitlines())


def without_numbers(text: str) -> list[str]:
    """The words of an output with its numbers masked: what depends neither on a run nor on where lines are wrapped."""
    return re.sub(r"─+", "─", _NUMBER.sub("#", text)).split()


def main() -> None:
    """Write every sample anew."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for sample in (sample for sample in samples() if sample.page == page):
            begin, end = (f"<!-- sample:{sample.name} {edge} -->" for edge in ("begin", "end"))
            block = f"{begin}\n```\n{run(sample.command, ROOT)}```\n{end}"
            mine = re.compile(f"{begin}.*?{end}", re.DOTALL)
            text = mine.sub(lambda _, block=block: block, text)  # type: ignore[misc]  # a default argument of a lambda
            print(f"{page.relative_to(ROOT)}: {sample.name}: {sample.command}")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
