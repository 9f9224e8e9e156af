"""Thousands of forged checkpoints: each is opened, and nothing but one line may come of it.

    python -m tools.fuzz.pickle_fuzz --cases 5000 --write

A case forges `.metadata`, `common.pt` or a JSON file of a tiny checkpoint (`opcodes`), and opens it as the command line
does. One process imports everything; each case is a fork of it, which may take 1 GiB more than it and ten seconds. What
may not happen: a canary set on any object that existed before (`process_state`), a file written, a program started, a
traceback, an escape sequence, torch's advice, too much memory or time, or the death of the process.
"""

import argparse
import gc
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.torch_dist import IndexUnpickler
from megagrow.checkpoint.pickles import StateUnpickler
from megagrow.cli import main as entry
from megagrow.config import ParallelLayout
from megagrow.convert.run import export_checkpoint, order_export
from megagrow.convert.work import RunOptions
from megagrow.log import printable
from tools.fuzz.opcodes import CANARY, drawn_json, drawn_pickle, text
from tools.fuzz.process_state import changes, state_of_process
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "figures" / "pickle_fuzz.md"
MEMORY, SECONDS, PATIENCE = 1 << 30, 10, 120
"""Bytes beyond the parent, seconds of work, and seconds in all on a machine that others use too."""
KINDS = (".metadata", ".metadata", ".metadata", "common.pt", "common.pt", "common.pt", "own", "model")
NAME = "iter_0000010\x1b[31m"
"""Of a case's checkpoint: a name that a terminal would obey, and that is part of every line."""
OWN_FILES = ("megagrow.json", "integrity.json", "metadata.json")
STARTS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "shutil.rmtree"}
"""Events of Python's audit that mean a program, a connection or a removal."""
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Sources:
    """Tiny checkpoints: as Megatron writes one, as megagrow does, and of Hugging Face."""

    bare: Path
    own: Path
    model: Path


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `refused`, `opened` or a fault; the seconds that it took; and the line, or what was wrong."""

    number: int
    kind: str
    end: str
    seconds: float
    what: str

    @property
    def is_fault(self) -> bool:
        """Whether that may not happen."""
        return self.end not in ("refused", "opened")


def make_sources(root: Path) -> Sources:
    """Write the checkpoints that cases forge."""
    of = shape(SMALL)
    own = write_checkpoint(root / "own", of, random_state(of, optimizer=False))
    bare = write_checkpoint(root / "bare", of, random_state(of, optimizer=False), seal=False)
    (bare / "megagrow.json").unlink()
    order = order_export(bare, "huggingface", "fp32", ParallelLayout(), of, None)
    return Sources(bare, own, export_checkpoint(order, root / "model", RunOptions()).target)


def forge(sources: Sources, number: int, place: Path) -> tuple[str, Path, list[str]]:
    """Write case `number` below a directory; return its kind, the checkpoint and the command that opens it."""
    chance = random.Random(number)
    kind = chance.choice(KINDS)
    if kind in (".metadata", "common.pt"):
        path = Path(shutil.copytree(sources.bare, place / NAME))
        names = (IndexUnpickler if kind == ".metadata" else StateUnpickler)(b"").names()
        file = path / kind
        old = file.read_bytes() if kind == ".metadata" else _pickle_in(file)
        content = planted(chance, old, drawn_pickle(chance, names), kind)
        file.write_bytes(content if kind == ".metadata" else archive(content))
        return kind, path, ["inspect", str(path)]
    path = Path(shutil.copytree(sources.own if kind == "own" else sources.model, place / NAME))
    name = chance.choice(OWN_FILES if kind == "own" else MODEL_FILES)
    forge_json(path / name, chance)
    return name, path, ["verify" if name == "integrity.json" else "inspect", str(path)]


def forge_json(file: Path, chance: random.Random) -> None:
    """Forge a JSON file, or the header of a safetensors file."""
    if file.suffix == ".safetensors":
        old = file.read_bytes()
        length = int.from_bytes(old[:8], "little")
        header = drawn_json(chance, old[8 : 8 + length])
        file.write_bytes(len(header).to_bytes(8, "little") + header + old[8 + length :])
        return
    if not file.exists():  # an index is read only where there is no single file of weights
        (file.parent / "model.safetensors").rename(file.parent / "model-00001-of-00001.safetensors")
        template = json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}).encode()
    else:
        template = file.read_bytes()
    file.write_bytes(drawn_json(chance, template))


def planted(chance: random.Random, old: bytes, code: bytes, kind: str) -> bytes:
    """Return a pickle that runs the opcodes first, instead of everything, or as a value in its usual place."""
    start = 2 + (9 if old[2:3] == b"\x95" else 0)
    style = chance.randrange(3)
    if style == 0:
        return old[:2] + code + b"0" + old[start:]
    if style == 1:
        return b"\x80\x04" + code + b"."
    if kind == "common.pt":
        key = chance.choice(("args", "iteration", "optimizer", "content_metadata", "huggingface"))
        return b"\x80\x04}" + text(key) + code + b"s."
    field = chance.choice(("state_dict_metadata", "storage_data", "mcore_data", "planner_data"))
    metadata = text("torch.distributed.checkpoint.metadata") + text("Metadata") + b"\x93)\x81"
    return b"\x80\x04" + metadata + b"}" + text("state_dict_metadata") + b"}s" + text(field) + code + b"sb."


def archive(content: bytes) -> bytes:
    """Return a torch.save archive with this pickle, and a storage."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("data/0", bytes(64))):
            made.writestr(f"archive/{name}", data)
    return stream.getvalue()


def _pickle_in(file: Path) -> bytes:
    with zipfile.ZipFile(file) as made:
        return made.read(next(name for name in made.namelist() if name.endswith("data.pkl")))


Picture = dict[str, Any]
"""What `state_of_process` returns."""


def run_cases(
    parent: "Parent", numbers: Iterable[int], at_once: int = 1, weaken: Callable[[], None] | None = None
) -> Iterator[Outcome]:
    """Run cases, each in a fork of this process, and say how each ended.

    Args:
        parent: this process. It must not have threads, whose locks a fork would inherit.
        numbers: of the cases.
        at_once: cases that run at the same time.
        weaken: called in each fork first; a test plants a weakness by it.
    """
    left, running = iter(numbers), dict[int, _Running]()
    while True:
        for number in itertools.islice(left, at_once - len(running)):
            case = _start(parent, number, weaken)
            running[case.child] = case
        if not running:
            return
        for case in list(running.values()):
            done, status = os.waitpid(case.child, os.WNOHANG)
            late = time.monotonic() - case.started > PATIENCE
            if late and not done:
                os.kill(case.child, signal.SIGKILL)
                os.waitpid(case.child, 0)
            if done or late:
                del running[case.child]
                yield _finished(case, status if done else None)
        time.sleep(0.003)


@dataclass(frozen=True)
class _Running:
    """A case at work."""

    number: int
    kind: str
    path: Path
    child: int
    started: float


def _start(parent: "Parent", number: int, weaken: Callable[[], None] | None) -> _Running:
    place = Path(tempfile.mkdtemp(dir=parent.root))
    kind, path, command = forge(parent.sources, number, place)
    started = time.monotonic()
    child = os.fork()
    if not child:
        _child(command, place, parent.picture, weaken)
    return _Running(number, kind, path, child, started)


def _finished(case: _Running, status: int | None) -> Outcome:
    seconds = time.monotonic() - case.started
    end, what = _outcome(status, case.path.parent / "said")
    shutil.rmtree(case.path.parent, ignore_errors=True)
    return Outcome(case.number, case.kind, end, seconds, what.replace(printable(str(case.path)), "PATH"))


def _outcome(status: int | None, said: Path) -> tuple[str, str]:
    if status is None:
        return "too slow", f"hangs for {PATIENCE} s"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "too slow", f"more than {SECONDS} s"
    if os.WIFSIGNALED(status):
        return "died", f"signal {os.WTERMSIG(status)}"
    answer = json.loads(said.read_text()) if said.is_file() else {"fault": "no answer"}
    err, out = answer.get("err", ""), answer.get("out", "")
    if answer.get("fault"):
        return str(answer["fault"]), str(answer.get("what", ""))
    if "Memory" in err or "alloc" in err:
        return "too much memory", err
    if not all(line.isprintable() for line in (out + err).splitlines()):
        return "an escape sequence", repr(err)
    if "weights_only" in err:
        return "torch's advice", err
    lines = err.splitlines()
    if answer["code"] == 2 and lines and all(line.startswith("megagrow: error: ") for line in lines):
        return "refused", lines[0].removeprefix("megagrow: error: ")
    return ("opened", "") if answer["code"] == 0 else (f"code {answer['code']}", err)


def _child(command: Sequence[str], place: Path, picture: Picture, weaken: Callable[[], None] | None) -> None:
    """Open a checkpoint as the command line does, and leave what was said. Never returns."""
    answer: dict[str, Any] = {"fault": "no answer"}
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
        if weaken is not None:
            weaken()
            picture = state_of_process()
        events = _watched(place)
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["megagrow", *command]
        code: Any = None
        try:
            with redirect_stdout(out), redirect_stderr(err):
                entry.main()
        except SystemExit as left:
            code = left.code or 0
        answer = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        if altered := [*events, *changes(picture, state_of_process(), CANARY)]:
            answer = {"fault": "a canary", "what": ", ".join(altered[:5])}
    except BaseException as error:
        answer = {"fault": "a traceback", "what": f"{type(error).__name__}: {error}"[:300]}
    finally:
        with open(place / "said", "w", encoding="utf-8") as stream:
            json.dump(answer, stream)
        os._exit(0)


def _watched(place: Path) -> list[str]:
    """Return a list to which is added what the process starts, writes, or reads of a forbidden place."""
    events: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS:
            events.append(f"{event} {arguments!r:.100}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            name = os.path.abspath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes and not name.startswith("/dev/")) or (name.startswith("/etc/") and "localtime" not in name):
                events.append(f"open {name}")

    sys.addaudithook(hook)
    return events


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@dataclass(frozen=True)
class Parent:
    """This process, in which everything is imported: what it holds, and the checkpoints that cases forge."""

    root: Path
    sources: Sources
    picture: Picture


def warm_parent(root: Path) -> Parent:
    """Import, in this process, all that a case may need: forks then take no time and no memory for it."""
    import torch

    torch.set_num_threads(1)
    sources = make_sources(root)
    for path, verb in ((sources.bare, "inspect"), (sources.own, "inspect"), (sources.own, "verify")):
        sys.argv = ["megagrow", verb, str(path)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
            entry.main()
    gc.collect()
    gc.freeze()
    return Parent(root, sources, state_of_process())


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Return a table of how the cases of each file ended, and the most frequent reasons of a refusal."""
    kinds = sorted({each.kind for each in outcomes})
    slow = sorted(each.seconds for each in outcomes)
    lines = [
        f"{len(outcomes)} cases in {seconds / 60:.1f} minutes; the median took {slow[len(slow) // 2]:.2f} s, "
        f"the slowest {slow[-1]:.1f} s.",
        "",
        "| file | cases | refused with one line | opened | faults |",
        "|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = [each for each in outcomes if each.kind == kind]
        ends = Counter("faults" if each.is_fault else each.end for each in own)
        lines.append(f"| `{kind}` | {len(own)} | {ends['refused']} | {ends['opened']} | {ends['faults']} |")
    reasons = Counter(_reason(each.what) for each in outcomes if each.end == "refused")
    lines += ["", "| the most frequent reasons | times |", "|---|---|"]
    lines += [f"| {reason} | {times} |" for reason, times in reasons.most_common(15)]
    return "\n".join(lines)


def _reason(line: str) -> str:
    """Return a line of error without what differs from case to case."""
    line = re.sub(r"^PATH\S*:\s*", "", line)
    return re.sub(r"'[^']*'|\d[\d,.]*", "#", line).replace("|", "/")[:70]


def main() -> int:
    """Entry point; return 0 if nothing happened that may not."""
    parser = argparse.ArgumentParser(description="Open forged checkpoints; nothing but one line may come of it.")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--at-once", type=int, default=2, help="cases at the same time")
    parser.add_argument("--write", action="store_true", help=f"write the summary into {PAGE.name}")
    asked = parser.parse_args()
    started, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="pickle-fuzz-") as name:
        parent = warm_parent(Path(name))
        for outcome in run_cases(parent, range(asked.first, asked.first + asked.cases), asked.at_once):
            outcomes.append(outcome)
            if outcome.is_fault:
                print(outcome, flush=True)
    found = summary(outcomes, time.monotonic() - started)
    print(found)
    if asked.write:
        head = "# Forged checkpoints\n\nWritten by `python -m tools.fuzz.pickle_fuzz --write`.\n\n"
        PAGE.write_text(head + found + "\n", encoding="utf-8")
    return 1 if any(each.is_fault for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
