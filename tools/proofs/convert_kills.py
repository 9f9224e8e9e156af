"""Kill a converter at random moments, again and again, and see that it ends with the bytes of one that nobody touched.

    python -m tools.proofs.convert_kills --kills 200 --seed 0 --write

Two sources of some tens of MB are converted once in peace: one is grown, with its optimizer, and of one the layers are
stacked, which only copies, on a command line without torch. Then a conversion of one of them is started, and one of its
processes gets SIGKILL: the only one, one of several ranks, all of them, the main process of `megagrow convert
--workers N`, or one of its workers. The moment is drawn: by the clock, or when the finish or the publishing begins.
After every kill nothing that can be seen may be taken for a whole checkpoint unless it is one; where only a worker was
killed the others must finish. The same is started again, perhaps killed again, and run to its end. Then every file is
compared, byte for byte.

Most conversions are run by processes that are forked from this one, which has imported everything: a kill then costs
a second and not ten. Some are real command lines.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megagrow.checkpoint.directory import integrity, iterations, recovery
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.convert.work import DIRECTORY, FINISH, Journal, RunOptions
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER
from tools.proofs.processes import Process
from tools.reference.tiny_checkpoint import random_state, write_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "figures" / "convert_kills.md"
SMALL = {
    "num_layers": 2, "hidden_size": 192, "ffn_hidden_size": 512, "num_attention_heads": 6, "num_query_groups": 2,
    "kv_channels": 32, "vocab_size": 4096, "seq_length": 64,
}  # fmt: skip
GROWN = {"num_layers": 4, "hidden_size": 320, "ffn_hidden_size": 864, "num_attention_heads": 10}
PLAIN = SMALL | {
    "num_layers": 4, "hidden_size": 768, "ffn_hidden_size": 2048, "num_attention_heads": 12, "kv_channels": 64,
}  # fmt: skip
STACKED = {"num_layers": 12}
WAYS = {
    "one process": 0.45,
    "all of 2 or 3 ranks": 0.2,
    "one of 2 or 3 ranks": 0.2,
    "command line, main process": 0.09,
    "command line, one worker": 0.06,
}
PHASES = ("before the first unit", "in a unit", "in the finish", "in the publishing")
TIMES = {"conversion.json", "integrity.json"}
PATIENCE_S = 240.0


@dataclass
class Attempt:
    """A conversion and what was done to it."""

    way: str
    kind: str
    workers: int
    phases: list[str] = field(default_factory=list)
    kept: int = 0
    opened: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """What is converted, into what, by which words on a command line, how long that takes, and what comes of it."""

    source: Path
    target: TargetSpec
    words: tuple[str, ...]
    wanted: dict[str, bytes]
    seconds: float


def main() -> int:
    """Entry point; return 0 if every conversion ended as if nothing had happened."""
    parser = argparse.ArgumentParser(description="Kill conversions at random moments; compare with a quiet one.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary directory")
    parser.add_argument("--write", action="store_true", help=f"write the figures into {PAGE}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="megagrow-kills-", dir=asked.directory) as temporary:
        cases, chance = prepare(Path(temporary)), random.Random(asked.seed)
        for kind, case in cases.items():
            size = sum(map(len, case.wanted.values())) / 1e6
            print(f"{kind}: {size:.0f} MB in {case.seconds:.2f} s, undisturbed", flush=True)
        attempts: list[Attempt] = []
        while (kills := sum(len(attempt.phases) for attempt in attempts)) < asked.kills:
            attempts.append(attempt(cases, Path(temporary) / "save", chance, asked.kills - kills))
            shown = attempts[-1]
            print(
                f"{kills}: {shown.kind}, {shown.way}: {', '.join(shown.phases)}; {shown.kept} kept {shown.wrong}",
                flush=True,
            )
    page = report(cases, attempts, asked.seed)
    print(page)
    if asked.write:
        PAGE.write_text(page)
    return 1 if any(attempt.wrong for attempt in attempts) else 0


def prepare(root: Path) -> dict[str, Case]:
    """Make the sources, and convert each once in peace; then again, for the time without what is done only once."""
    cases = {}
    for kind, small, larger, options in (
        ("grown", SMALL, GROWN, GrowthConfig(hidden="balanced", noise=0.1)),
        ("copied", PLAIN, STACKED, GrowthConfig(layer="stack")),
    ):
        shape, copied = ModelShape(**small), kind == "copied"
        target = TargetSpec(
            stage="large",
            shape=ModelShape(**small | larger),
            layout=ParallelLayout(tensor_model_parallel_size=2),
            growth=options,
            precision="bf16" if copied else "fp32",
            seed=7,
        )
        state = random_state(shape, optimizer=not copied, dtype=torch.bfloat16 if copied else torch.float32)
        source = write_checkpoint(
            root / f"{kind}-small", shape, state, precision=target.precision, optimizer=not copied
        )
        for name in ("first", "quiet"):
            begun = time.monotonic()
            convert_checkpoint(source, root / kind / name, target)
        seconds = time.monotonic() - begun
        words = [f"model.{name}={size}" for name, size in larger.items()]
        words += ["growth.layer=stack"] if copied else ["growth.hidden=balanced", "growth.noise=0.1"]
        cases[kind] = Case(source, target, tuple(words), files_of(root / kind / "quiet" / "iter_0000000"), seconds)
    return cases


def attempt(cases: dict[str, Case], save: Path, chance: random.Random, kills: int) -> Attempt:
    """Start a conversion, kill it up to three times, let it end, and compare."""
    shutil.rmtree(save, ignore_errors=True)
    (way,) = chance.choices(list(WAYS), list(WAYS.values()))
    kind = chance.choice(list(cases))
    case = cases[kind]
    tried = Attempt(way, kind, chance.randint(2, 3) if "one process" not in way else 1)
    if way == "command line, main process":
        tried.workers = chance.randint(1, 3)
    made: dict[str, int] = {}
    for _ in range(min(kills, 1 if chance.random() < 0.6 else chance.randint(2, 3))):
        if not kill_once(case, save, chance, tried):
            break
        seen = finished_files(save)
        tried.wrong += [f"{name} was made again" for name in made if name in seen and seen[name] != made[name]]
        made, tried.kept = seen, max(tried.kept, len(Journal(staging_of(save)).finished_units()))
    if code := run_to_end(case, save, tried):
        tried.wrong.append(f"ends with {code}")
    compare(case, save, tried, made)
    return tried


def kill_once(case: Case, save: Path, chance: random.Random, tried: Attempt) -> bool:
    """One start and one kill, and a look at what it left; False if it ended before."""
    started = begin(case, save, tried)
    happened = moment(case, save, chance, tried, started[0])
    spared: list[Process] = []
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not happened() and any(process.poll() is None for process in started):
            assert time.monotonic() < deadline, f"{tried.way}: nothing happens"
            time.sleep(0.0002)
        phase, victims = phase_of(save), [process for process in started if process.poll() is None]
        if not victims:
            return False
        if tried.way.startswith("one of"):
            victims = [chance.choice(victims)]
            spared = [process for process in started if process not in victims]
        elif tried.way == "command line, one worker":
            spared, victims = started, []
            if not kill_worker(save, started[0]):
                return False
        for process in victims:
            process.kill()
        tried.phases.append(phase)
        tried.wrong += [f"ended with {code} beside a killed one" for p in spared if (code := p.wait(PATIENCE_S))]
    finally:
        for process in started:
            process.kill()
            process.wait(PATIENCE_S)
    time.sleep(0.05 if "command" in tried.way else 0.0)  # workers die with their parent, in a moment
    look(case, save, tried)
    return True


def moment(case: Case, save: Path, chance: random.Random, tried: Attempt, main: Process) -> Callable[[], bool]:
    """A question, to be asked often: is it time? It is, so many seconds after something can be seen."""
    journal, kind = staging_of(save) / DIRECTORY, chance.random()
    longest, sees = 0.03, (journal / f"{FINISH}.claim").exists
    if tried.way == "command line, one worker":
        longest, sees = 0.05, lambda: bool(workers_of(save, main))
    elif kind < 0.15:
        longest, sees = case.seconds * (4 if "command" in tried.way else 0.5), lambda: True
    elif kind < 0.65:
        longest, sees = case.seconds, (journal / "plan.json").exists
    elif kind > 0.85:
        longest, sees = 0.0015, (save / "iter_0000000").exists
    delay, seen = chance.uniform(0, longest), list[float]()

    def happened() -> bool:
        if not seen and sees():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > delay

    return happened


def kill_worker(save: Path, main: Process) -> bool:
    """Kill a worker that holds a claim; False if there is none any more."""
    with suppress(ProcessLookupError, IndexError):
        os.kill(workers_of(save, main)[0], signal.SIGKILL)
        return True
    return False


def workers_of(save: Path, main: Process) -> list[int]:
    """The processes that hold claims, but for the main one."""
    found = set()
    for claim in (staging_of(save) / DIRECTORY).glob("unit-*.claim"):
        try:
            found.add(int(json.loads(claim.read_text())["pid"]))
        except FileNotFoundError:
            continue
    return sorted(found - {main.pid})


def begin(case: Case, save: Path, tried: Attempt) -> list[Process]:
    """Start the processes of a conversion."""
    how = RunOptions(contents=False, memory=16 << 30)
    if "command" in tried.way:
        line = [sys.executable, "-m", "megagrow", "convert", str(case.source), str(save)]
        line += [*case.words, "parallel.tensor_model_parallel_size=2"]
        line += [
            f"seed={case.target.seed}",
            f"stage={case.target.stage}",
            f"--workers={tried.workers}",
            "--memory=4GiB",
        ]
        return [Process(line)]

    def rank(number: int) -> None:
        os.environ.update(RANK=str(number), WORLD_SIZE=str(tried.workers), LOCAL_WORLD_SIZE=str(tried.workers))
        convert_checkpoint(case.source, save, case.target, how)

    if tried.workers == 1:
        return [Process(lambda: convert_checkpoint(case.source, save, case.target, how))]
    return [Process(lambda number=number: rank(number)) for number in range(tried.workers)]  # type: ignore[misc]  # a default argument of a lambda


def run_to_end(case: Case, save: Path, tried: Attempt) -> int:
    """The same again, undisturbed; return the worst exit code."""
    return max((process.wait(PATIENCE_S) for process in begin(case, save, tried)), key=abs)


def phase_of(save: Path) -> str:
    """What a conversion is doing, by what it has left on the disk."""
    journal, final = staging_of(save) / DIRECTORY, save / "iter_0000000"
    if final.exists():
        return PHASES[3]
    if (journal / f"{FINISH}.claim").exists():
        return PHASES[2]
    return PHASES[1] if list(journal.glob("unit-*")) else PHASES[0]


def look(case: Case, save: Path, tried: Attempt) -> None:
    """After a kill: what a reader takes for whole must be whole."""
    staging, final = staging_of(save), save / "iter_0000000"
    for iteration in iterations.published(save):
        try:
            integrity.check(iterations.iteration_path(save, iteration))
        except CheckpointError as error:
            tried.wrong.append(f"published, and {error}")
    if (save / TRACKER).exists() and recovery.newest_whole(save) != final:
        tried.wrong.append("the tracker names what is not there")
    for path in (staging, save):
        try:
            open_checkpoint(path)
        except CheckpointError:
            continue
        tried.opened += path is staging
        opened = staging if path is staging else final
        missing = [name for name, data in case.wanted.items() if name.startswith("__") and read(opened / name) != data]
        tried.wrong += [f"{opened.name} is opened, and {name} is not whole" for name in missing]


def compare(case: Case, save: Path, tried: Attempt, made: dict[str, int]) -> None:
    """At the end: every file's bytes, and the times of those that were finished before the last start."""
    final = save / "iter_0000000"
    found = files_of(final)
    tried.wrong += [
        f"{name} differs" for name in found.keys() | case.wanted if found.get(name) != case.wanted.get(name)
    ]
    tried.wrong += [
        f"{name} was made again" for name, told in made.items() if (final / name).stat().st_mtime_ns != told
    ]
    left = {entry.name for entry in save.iterdir() if ".staging-" not in entry.name} - {final.name, TRACKER}
    tried.wrong += [f"{name} is left" for name in left]
    if iterations.read_tracker(save) != 0:
        tried.wrong.append("the tracker is wrong")


def files_of(path: Path) -> dict[str, bytes]:
    """Every file; of integrity.json what does not depend on the time of day that conversion.json tells."""
    found = {file.name: file.read_bytes() for file in path.iterdir() if file.name not in TIMES}
    sealed = json.loads((path / "integrity.json").read_text())
    for files in (sealed["files"], sealed["blocks"]["files"]):
        files.pop("conversion.json")
    return found | {"integrity.json": json.dumps(sealed).encode()}


def finished_files(save: Path) -> dict[str, int]:
    """The files of finished units, with their times."""
    staging = staging_of(save)
    names = [name for told in Journal(staging).finished().values() for name in told]
    return {name: (staging / name).stat().st_mtime_ns for name in names}


def staging_of(save: Path) -> Path:
    """Where a conversion is made."""
    return iterations.conversion_staging(save / "iter_0000000")


def read(file: Path) -> bytes:
    """Its bytes; none if it is not there."""
    return file.read_bytes() if file.is_file() else b""


def report(cases: dict[str, Case], attempts: list[Attempt], seed: int) -> str:
    """The page of figures."""
    phases = Counter((attempt.way, phase) for attempt in attempts for phase in attempt.phases)
    lines = ["| killed | kills | " + " | ".join(PHASES) + " | ended bit-identical | units kept |"]
    lines.append("|---|" + "---|" * (len(PHASES) + 3))
    for way in [*WAYS, "all"]:
        mine = [attempt for attempt in attempts if attempt.phases and way in (attempt.way, "all")]
        counts = [sum(n for (of, phase), n in phases.items() if phase == p and way in (of, "all")) for p in PHASES]
        good = sum(not attempt.wrong for attempt in mine)
        kept = sum(attempt.kept for attempt in mine)
        cells = [sum(counts), *counts, f"{good} of {len(mine)}", kept]
        lines.append(f"| {way} | " + " | ".join(map(str, cells)) + " |")
    wrong = sorted({text for attempt in attempts for text in attempt.wrong})
    opened = sum(attempt.opened for attempt in attempts)
    made = [
        f"a target of {sum(map(len, case.wanted.values())) / 1e6:.0f} MB ({case.seconds:.1f} s undisturbed)"
        for case in cases.values()
    ]
    met = [attempt for attempt in attempts if attempt.phases]
    copied = sum(attempt.kind == "copied" for attempt in met)
    alone = sum(attempt.kind == "copied" and "command" in attempt.way for attempt in met)
    return f"""# Kills of the converter

```
python -m tools.proofs.convert_kills --kills {sum(phases.values())} --seed {seed} --write
```

The script converts two checkpoints, again and again. One, with its optimizer, is grown into {made[0]}.
The other has no optimizer: its layers are stacked into {made[1]}, which only
copies values. Of the {len(met)} targets {copied} are such copies, and command lines that run without torch make {alone}
of these. At a random moment one of the processes gets `kill -9`. The same conversion is then started again. One target
is killed up to three times before it may run to its end.

{chr(10).join(lines)}

- *Ended bit-identical*: every file has the bytes of the undisturbed conversion. Only `conversion.json` (it contains the
  time of day) and its hash in `integrity.json` are not compared.
- *Units kept*: units that were finished before the last kill and not made again. Their files keep their modification
  time.
- Where one of several ranks, or one worker, was killed, the others ended with exit code 0.
- After each kill every published directory passed all checks, and the tracker named only such directories. {opened}
  times a kill came between the index and the renaming: then the hidden directory could be opened by hand, and all its
  data was complete. In all other cases `open_checkpoint` refused it.
- A worker of a command line is killed while it holds a unit.
- Anything else that was wrong: {"; ".join(wrong) if wrong else "nothing"}.
"""


if __name__ == "__main__":
    sys.exit(main())
