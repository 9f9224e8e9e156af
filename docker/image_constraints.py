"""Constraints for a venv on top of an image that has its own packages: keep the image's where possible, else use ours.

    python image_constraints.py constraints.txt > image-constraints.txt
    python image_constraints.py --held                 # packages that must not change: compare before and after

An image with a compiled torch has hundreds of packages that fit each other. Each of our pins therefore becomes the
weakest constraint that cannot lead to an untested version. Packages compiled against torch are held at the installed
version. A package that the image has in an older version may stay or be upgraded up to our pin. A package that it has
in a newer version is not constrained. Only packages that it lacks are pinned. Our pins fit each other, so the upper
ends of these ranges do too.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.version import Version

HELD = re.compile(r"torch|torchvision|triton|pytorch-triton|numpy|apex|setuptools|flash-attn.*|transformer-engine.*")
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s#;]+)")


def normal(name: str) -> str:
    """The normalized name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def found() -> dict[str, str]:
    """Name and version of every installed distribution; of duplicates the first on the path, as in an import."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        versions.setdefault(normal(distribution.metadata["Name"]), distribution.version)
    return versions


def held(installed: Mapping[str, str]) -> list[str]:
    """Constraints that hold torch, and packages compiled against it, at their installed versions."""
    return [f"{name}=={version}" for name, version in sorted(installed.items()) if HELD.fullmatch(name)]


def constraints(ours: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Lines for `pip install --constraint`, from the lines of our constraints.txt and the installed versions."""
    pins = {normal(match[1]): match[2] for match in map(PIN.match, ours) if match}
    free = {name: pin for name, pin in pins.items() if not HELD.fullmatch(name)}
    return held(installed) + [line for name, pin in free.items() if (line := _line(name, pin, installed.get(name)))]


def _line(name: str, pin: str, version: str | None) -> str | None:
    if version is None or Version(version) == Version(pin):
        return f"{name}=={pin}"
    return f"{name}>={version},<={pin}" if Version(version) < Version(pin) else None


if __name__ == "__main__":
    (argument,) = sys.argv[1:]
    lines = (
        held(found())
        if argument == "--held"
        else constraints(Path(argument).read_text(encoding="utf-8").splitlines(), found())
    )
    print("\n".join(lines))
