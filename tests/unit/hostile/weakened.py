"""A program for `test_pickle_fuzz`: run cases of the fuzzer with a weakness planted, and print how each ended.

python -m tests.unit.hostile.weakened WEAKNESS
"""

import json
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.torch_dist import index
from megagrow.checkpoint.formats.torch_dist.index import IndexUnpickler
from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import ClosedUnpickler, StateUnpickler, zip_reader
from megagrow.cli import output
from tools.fuzz.opcodes import drawn_pickle, text
from tools.fuzz.pickle_fuzz import KINDS, run_cases, warm_parent

MOST = 6000
"""Cases among which those are looked for that begin with a name, or contain an opcode."""


def hand_out(unpickler: type[ClosedUnpickler], module: str, live: Callable[[str], Any]) -> None:
    """Let an unpickler hand out what lives, for the names of a module, as the old ones did."""
    closed = unpickler.stand_in

    def stand_in(self: ClosedUnpickler, wanted: str, name: str) -> Any:
        found = live(name) if wanted == module else None
        return closed(self, wanted, name) if found is None else found

    type.__setattr__(unpickler, "stand_in", stand_in)


def types() -> None:
    """Hand out members of DType."""
    hand_out(StateUnpickler, "torch", lambda name: DType(name) if name in {each.value for each in DType} else None)


def paths() -> None:
    """Hand out a class of Python's."""
    hand_out(IndexUnpickler, "pathlib", lambda name: pathlib.PurePosixPath)


def unbounded() -> None:
    """Scan nothing."""
    for module in (index, zip_reader):
        vars(module)["check_pickle"] = lambda data: None


def unescaped() -> None:
    """Print names as they are."""
    vars(output)["printable"] = lambda text: text


WEAK: dict[str, tuple[Callable[[], None], str, Callable[[bytes], bool], int]] = {
    "types": (types, "common.pt", lambda code: code.startswith(text("torch")), 80),
    "paths": (paths, ".metadata", lambda code: code.startswith(text("pathlib")), 60),
    "unbounded": (unbounded, ".metadata", lambda code: b"r" + (1 << 28).to_bytes(4, "little") in code, 10),
    "unescaped": (unescaped, ".metadata", lambda code: True, 5),
}
"""What is planted, in which file it shows, whether opcodes may show it, and how many cases are run."""


def likely(kind: str, shows: Callable[[bytes], bool], most: int) -> list[int]:
    """Return the numbers of cases that a weakness may show in; others would only take time."""
    unpickler = IndexUnpickler if kind == ".metadata" else StateUnpickler
    names, found = unpickler(b"").names(), []
    for number in range(MOST):
        chance = random.Random(number)
        if chance.choice(KINDS) == kind:
            if shows(drawn_pickle(chance, names)):
                found.append(number)
        if len(found) == most:
            break
    return found


def main() -> None:
    """Entry point."""
    weaken, kind, shows, most = WEAK[sys.argv[1]]
    numbers = likely(kind, shows, most)
    with tempfile.TemporaryDirectory() as root:
        parent = warm_parent(Path(root))
        print(json.dumps([(each.end, each.what) for each in run_cases(parent, numbers, 2, weaken)]))


if __name__ == "__main__":
    main()
