"""Kill a family at random moments, again and again, and see that it ends as if nothing had happened.

    python -m tools.proofs.kill_test examples/demo/family.yaml --kills 40 --seed 3 stages.0.train_tokens=204800 ...

`megagrow run` gets SIGKILL, and only it; then the same command is given again, until it ends by itself. The moments
are drawn from a seed: so many seconds after the start, after so many more records, when something begins to be
written, when a tracker moves. After every kill nothing may be left running, and every published checkpoint must be
whole. In the end all losses and all tensors must have the bits of a run that nobody touched. Every other run
writes its checkpoints in the background.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from megagrow import records
from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.proof.verify import verify
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.records import EvalRecord, StepRecord

BACKGROUND = "checkpoint.async_save=true"
PATIENCE_S = 5.0
"""Seconds that the children of a killed run have to be gone."""

KINDS = ("records", "time", "writing", "time", "tracker")


class Survived(AssertionError):
    """Something outlived a kill that should not have, or did not outlive it and should have."""


@dataclass(frozen=True)
class Moment:
    """When to kill: `count` events of a kind after the start, and `delay` seconds later."""

    kind: str
    count: int
    delay: float

    def __str__(self) -> str:
        event = "the start" if self.kind == "time" else f"{self.kind} x {self.count}"
        return f"{self.delay:.3f} s after {event}"


@dataclass(frozen=True)
class Kill:
    """What a kill met: the moment, seconds since the start, the processes below, and how long these lived on."""

    moment: Moment
    after: float
    processes: int
    gone_after: float


def draw(kills: int, seed: int, longest: float) -> list[Moment]:
    """Draw moments, as many of each of KINDS; `longest` is in seconds, for those that are told by the clock."""
    chance = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    chance.shuffle(kinds)
    return [_moment(kind, chance, longest) for kind in kinds]


def _moment(kind: str, chance: random.Random, longest: float) -> Moment:
    if kind == "time":
        return Moment(kind, 0, chance.uniform(0.0, longest))
    most = {"records": 10, "writing": 2, "tracker": 1}[kind]
    return Moment(kind, chance.randint(1, most), chance.uniform(0.0, 0.1))


def survive(family: Path, overrides: Sequence[str], kills: int, seed: int, longest: float = 8.0) -> list[Kill]:
    """Kill `megagrow run FAMILY OVERRIDES` so many times, then let it end; return the kills.

    Fewer are returned when the family was finished before. Survived is raised as the module's docstring says.
    """
    save, done = load(family, overrides).save, []
    for number, moment in enumerate(draw(kills, seed, longest)):
        more = [BACKGROUND] if number % 2 else []
        kill = kill_once(command(family, [*overrides, *more]), save, moment)
        check_published(save)
        if kill is None:
            break
        print(f"kill {number + 1}: {kill.moment} ({kill.after:.1f} s), {kill.processes} children gone after "
              f"{kill.gone_after:.2f} s", flush=True)  # fmt: skip
        done.append(kill)
    code, text = run(command(family, overrides))
    if code:
        raise Survived(f"after {len(done)} kills `megagrow run` ends with {code}:\n{text[-3000:]}")
    return done


def command(family: Path, overrides: Sequence[str]) -> list[str]:
    """The command line that is killed, and given again."""
    return [sys.executable, "-m", "megagrow", "run", str(family), *overrides]


def run(line: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end; return its exit code and all that it wrote."""
    done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def kill_once(line: Sequence[str], save: Path, moment: Moment) -> Kill | None:
    """Start a command, kill it at a moment and wait for its children; None if it ended by itself before.

    Survived when it ended with an error, or when a child lives on for more than PATIENCE_S.
    """
    happened = _watch(save, moment)
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while not happened() and process.poll() is None:
                time.sleep(0.002)
            time.sleep(moment.delay if process.poll() is None else 0.0)
            children = _below(process.pid)
        finally:
            process.kill()
            code = process.wait()
        if code != -9:
            output.seek(0)
            if code:
                raise Survived(f"`megagrow run` ends by itself with {code}:\n{output.read()[-3000:]}")
            return None
    killed = time.monotonic()
    while alive := [child for child in children if _lives(child)] + orphans(save):
        if time.monotonic() - killed > PATIENCE_S:
            raise Survived(f"{moment}: still there after {PATIENCE_S:g} s: {[_describe(child) for child in alive]}")
        time.sleep(0.02)
    return Kill(moment, killed - begun, len(children), time.monotonic() - killed)


def orphans(save: Path) -> list[psutil.Process]:
    """Processes that name the family's directory, other than this one and those that started it."""
    ours = {process.pid for process in psutil.Process().parents()} | {psutil.Process().pid}
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if process.pid not in ours and any(str(save) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return [process for process in found if _lives(process)]


def check_published(save: Path) -> None:
    """Survived unless every published checkpoint below a family's directory is whole, and none had to be refused."""
    if refused := sorted(save.glob("*/checkpoints/*.refused")):
        raise Survived(f"a run found its own checkpoint damaged: {refused}")
    for checkpoint in sorted(save.glob("*/checkpoints/iter_*")):
        if faults := verify(checkpoint).faults:
            raise Survived(f"{checkpoint}: {faults}")


def bits(family: Family, only: str | None = None) -> dict[str, object]:
    """All that must not depend on kills: every loss, and the last checkpoint of every stage (or of one)."""
    found: dict[str, object] = {}
    for index, stage in enumerate(family.stages):
        if only not in (None, stage.name):
            continue
        paths = FamilyPaths(family).stage(index)
        for record in records.read(paths.records):
            if isinstance(record, StepRecord | EvalRecord):
                found[f"{stage.name} {record.kind} {record.iteration}"] = (record.loss, record.consumed_tokens)
        last = paths.last_iteration()
        assert last is not None, f"{paths.checkpoints} has no checkpoint"
        found[f"{stage.name} checkpoint"] = (last, digest(iterations.iteration_path(paths.checkpoints, last)))
    return found


def digest(checkpoint: Path) -> str:
    """One sha256 of all tensors of a checkpoint: keys, shapes, types and bytes, however they were cut."""
    reader, total = TorchDistReader(checkpoint), hashlib.sha256()
    for key, info in sorted(reader.tensors.items()):
        total.update(f"{key} {info.shape} {info.dtype}".encode())
        total.update(reader.read_whole(key).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _watch(save: Path, moment: Moment) -> Callable[[], bool]:
    """A question, to be asked often: have so many events of the kind been seen since now?"""
    if moment.kind == "time":
        return lambda: True
    seen: set[object] = set(_events(save, moment.kind))

    def happened() -> bool:
        new = set(_events(save, moment.kind)) - seen
        counted.update(new)
        return len(counted) >= moment.count

    counted: set[object] = set()
    return happened


def _events(save: Path, kind: str) -> list[object]:
    """What there is to see of a kind: steps on record, directories being written, what trackers say."""
    if kind == "records":
        return [(path, size) for path in save.glob("*/records.jsonl") for size in [path.stat().st_size]]
    if kind == "writing":
        return list(save.glob("*/checkpoints/.iter_*.staging-*"))
    found: list[object] = []
    for path in save.glob("*/checkpoints/latest_checkpointed_iteration.txt"):
        found.append((path, path.read_text()))
    return found


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[-160:]}"
    except psutil.Error:
        return str(process.pid)


def main() -> int:
    """Entry point; return 0 if the family came through."""
    parser = argparse.ArgumentParser(description="Kill `megagrow run` at random moments; compare with a quiet run.")
    parser.add_argument("family", type=Path, help="a family.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--save", type=Path, help="directory for both families; default: a temporary one")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds, for moments told by the clock")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megagrow-kills-") as temporary:
        root = asked.save or Path(temporary)
        quiet, disturbed = ([*asked.overrides, f"save={root / name}"] for name in ("quiet", "disturbed"))
        code, text = run(command(asked.family, quiet))
        if code:
            sys.exit(f"the family does not even run undisturbed:\n{text[-3000:]}")
        kills = survive(asked.family, disturbed, asked.kills, asked.seed, asked.longest)
        wanted, found = (bits(load(asked.family, overrides)) for overrides in (quiet, disturbed))
        different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        print(f"{len(kills)} kills; {len(wanted)} losses and checkpoints, {len(different)} differ {different[:5]}")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
