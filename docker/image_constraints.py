"""Pins for a venv over an image that brings packages of its own: keep theirs where it will do, else take ours.

    python image_constraints.py constraints.txt > image-constraints.txt
    python image_constraints.py --held                 # what must not change, to be compared before and after

An image with a compiled torch has hundreds of packages that fit each other. So each of our pins becomes the mildest
constraint that still cannot lead anywhere untested: what is compiled against torch is held at the version found; what
the image has in an older version may stay or rise as far as our pin, no further; what it has in a newer one is left
alone; only what it lacks is pinned. Our pins fit each other, so the upper ends of all these ranges do too.
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
    """One spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def found() -> dict[str, str]:
    """Every distribution that this python sees, and its version; the first on its path counts, as in an import."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        versions.setdefault(normal(distribution.metadata["Name"]), distribution.version)
    return versions


def held(installed: Mapping[str, str]) -> list[str]:
    """Constraints that hold torch, and what is compiled against it, where they are."""
    return [f"{name}=={version}" for name, version in sorted(installed.items()) if HELD.fullmatch(name)]


def constraints(ours: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Lines for `pip install --constraint`, from the lines of our constraints.txt and what is installed."""
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
