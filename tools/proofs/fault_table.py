"""Hurt a family in every way that a cluster knows, again and again, and write down what it cost: a table of faults.

    python -m tools.proofs.fault_table --faults 100 --seed 0 --write

A tiny family (two stages, two ranks each) lies on a small disk of its own. `megagrow run` is started; at a random
moment something happens to it; it is given the same command again, until it ends by itself. Faults are drawn from a
seed: a rank, torchrun or the run itself gets SIGKILL, a rank is stopped, the disk becomes full, and between two runs a
file of the newest checkpoint is cut short or gets a flipped bit. After every fault: nothing may be left running, every
published checkpoint must be whole but those that were damaged, and no step that a whole checkpoint holds may have been
taken again. In the end all losses and tensors must have the bits of the family that nobody touched.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml

from megagrow import records
from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.proof.verify import verify
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.records import StepRecord
from megagrow.training.watchdog import HUNG
from tools.proofs import kill_test, processes
from tools.proofs.kill_test import Moment, Survived

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
KINDS = {
    "rank": "kill -9 of a rank, or of the process that converts",
    "run": "kill -9 of `megagrow run`",
    "torchrun": "kill -9 of torchrun",
    "stop": "SIGSTOP of a rank",
    "disk": "the disk becomes full",
    "cut": "a file of the newest checkpoint is cut short",
    "flip": "a bit of the newest checkpoint flips",
}
STEPS, EVERY, HANG_S, PATIENCE_S = 30, 5, 8, 900.0
MOMENTS = {"records": 25, "writing": 4, "tracker": 4, "time": 20}
"""What a moment is told by, and how many at most come before it, of events or of seconds."""
TEXTS = ("docs", "megagrow")
_BIG, _GROWTH = 1 << 30, ("convert", "verify")
_SMALL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_attention_heads": 4}
_LARGE = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 112, "num_attention_heads": 6}
FAMILY = {
    "name": "faults",
    "tokenizer": {"model_type": "bpe"},
    "evaluation": {"eval_interval": 10, "eval_samples": 8},
    "checkpoint": {"save_interval": EVERY, "keep": 4},
    "defaults": {
        "model": {"vocab_size": 512, "make_vocab_size_divisible_by": 64, "seq_length": 32, "kv_channels": 8},
        "batch": {"micro_batch_size": 4, "global_batch_size": 8},
        "schedule": {"max_lr": 3e-3, "lr_warmup_fraction": 0.1},
        "precision": "fp32",
        "train_tokens": STEPS * 8 * 32,
    },
    "stages": [
        {"name": "small", "model": _SMALL, "parallel": {"data_parallel_size": 2}},
        {"name": "large", "model": _LARGE, "parallel": {"tensor_model_parallel_size": 2}},
    ],
}


@dataclass
class Fault:
    """A fault and what came of it; `lost` counts steps that were taken and have to be taken again."""

    kind: str
    during: str
    moment: str
    seconds: float = 0.0
    code: int | None = None
    line: str = ""
    lost: int = 0
    wrong: list[str] = field(default_factory=list)


class Patient:
    """One family that faults happen to."""

    def __init__(self, file: Path, save: Path, chance: random.Random) -> None:
        self.save, self._chance = save, chance
        self.family: Family = load(file, [f"save={save}"])
        self._line = kill_test.command(file, [f"save={save}"])
        self._impatient = kill_test.command(file, [f"save={save}", f"training.hang_timeout_seconds={HANG_S}"])
        self._damaged: dict[Path, Fault] = {}

    def hurt(self, kind: str) -> Fault | None:
        """Let a fault happen; None where it cannot: the family is finished, or has nothing to damage."""
        if kind in ("cut", "flip"):
            return self._damage(kind)
        before, begun = self._whole(), time.time()
        moment = self._moment(kind)
        fault = self._strike(kind, moment)
        if fault is not None:
            fault.lost = sum(max(0, self._taken(stage) - whole) for stage, whole in self._whole().items())
        self._check(fault, before, begun)
        return fault

    def finish(self) -> list[str]:
        """Run to the end; return what went wrong."""
        before, begun = self._whole(), time.time()
        code, text = kill_test.run(self._line)
        if code:
            return [f"`megagrow run` ends with {code}: {text[-1500:]}"]
        fault = Fault("", "", "")
        self._check(fault, before, begun)
        return fault.wrong + [f"{path} was never found out" for path in self._damaged if not _refused(path)]

    def _moment(self, kind: str) -> Moment:
        if kind == "stop":
            return Moment("records", self._chance.randint(1, MOMENTS["records"]), self._chance.uniform(0.0, 0.1))
        if self._grows() and kind != "torchrun" and self._chance.random() < 0.8:
            return Moment("convert", 1, self._chance.uniform(0.0, 6.0))
        event = self._chance.choice(list(MOMENTS))
        if event == "time":
            return Moment(event, 0, self._chance.uniform(0.0, MOMENTS[event]))
        return Moment(event, self._chance.randint(1, MOMENTS[event]), self._chance.uniform(0.0, 0.1))

    def _grows(self) -> bool:
        """Whether the next thing to happen is the growth."""
        last = [FamilyPaths(self.family).stage(index).last_iteration() for index in range(2)]
        return last == [STEPS, None]

    def _strike(self, kind: str, moment: Moment) -> Fault | None:
        """Start a run and let the fault happen to it at the moment; None if it ended by itself before."""
        happened = (
            kill_test._watch(self.save, moment) if moment.kind != "convert" else lambda: processes.job(run) == "convert"
        )
        with tempfile.TemporaryFile("w+") as output:
            line = self._impatient if kind == "stop" else self._line
            run: subprocess.Popen[bytes]
            run = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                while run.poll() is None and not (happened() and (kind != "stop" or processes.ranks(run))):
                    time.sleep(0.002)
                time.sleep(moment.delay if run.poll() is None else 0.0)
                fault, struck, before = Fault(kind, processes.job(run), str(moment)), time.monotonic(), run.poll()
                if before is None:
                    with self._action(kind, run):
                        code = run.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise Survived(f"{kind} at {moment}: `megagrow run` hangs") from None
            finally:
                run.kill()
                run.wait()
            output.seek(0)
            text = output.read()
        if before == HUNG and kind == "stop":
            return self._strike(kind, moment)  # somebody paused this whole test: its short timeout is right to end it
        if before:
            raise Survived(f"`megagrow run` ends by itself with {before}: {text[-1500:]}")
        if before == 0 or code == 0:
            return None
        while kill_test.orphans(self.save):
            if time.monotonic() - struck > PATIENCE_S:
                raise Survived(f"{kind} at {moment}: still there: {kill_test.orphans(self.save)}")
            time.sleep(0.02)
        fault.seconds, fault.code = time.monotonic() - struck, code
        errors = [line for line in text.splitlines() if line.startswith("megagrow: error: ")]
        fault.line = errors[-1] if errors else ""
        if "Traceback" in text:
            fault.wrong.append(f"a traceback: {text[-1500:]}")
        if kind in ("disk", "stop") and not errors:
            fault.wrong.append(f"no line says why: {text[-500:]}")
        return fault

    @contextmanager
    def _action(self, kind: str, run: subprocess.Popen[bytes]) -> Iterator[None]:
        """Let the fault happen; what must be mended before the next run is mended when this ends."""
        if kind == "disk":
            disk = self.save.parent
            _resize(disk, shutil.disk_usage(disk).used + self._chance.choice((16, 256, 1024)) * 1024)
            try:
                yield
            finally:
                _resize(disk, _BIG)
            return
        victims = {
            "rank": processes.ranks(run),
            "stop": processes.ranks(run),
            "torchrun": processes.torchruns(run),
        }.get(kind, [])
        victims = victims or ([] if kind in ("run", "stop") else processes.jobs(run))
        try:
            if victims and kind == "stop":
                self._chance.choice(victims).suspend()
            elif victims:
                self._chance.choice(victims).kill()
            else:
                run.kill()
        except psutil.NoSuchProcess:
            run.kill()
        yield

    def _damage(self, kind: str) -> Fault | None:
        """Damage the newest checkpoint of the stage in hand, where there is an older one to go back to."""
        for index in (1, 0):
            save = FamilyPaths(self.family).stage(index).checkpoints
            known = [iterations.iteration_path(save, number) for number in iterations.published(save)]
            whole = [path for path in known if path not in self._damaged]
            newest = self._whole_of(index) or 0
            if len(whole) > 1 and (0 < newest < STEPS or (newest == STEPS and self._grows())):
                break
        else:
            return None
        victim = self._chance.choice([file for file in sorted(whole[-1].iterdir()) if file.stat().st_size])
        content = bytearray(victim.read_bytes())
        place = self._chance.randrange(len(content))
        if kind == "cut":
            content = content[:place]
        else:
            content[place] ^= 1 << self._chance.randrange(8)
        victim.write_bytes(content)
        shutil.rmtree(_aside(whole[-1]), ignore_errors=True)  # of earlier damage to this iteration
        fault = Fault(kind, "between runs", f"{victim.name} at byte {place}")
        self._damaged[whole[-1]] = fault
        fault.lost = max(0, self._taken(index) - (self._whole_of(index) or 0))
        return fault

    def _check(self, fault: Fault | None, before: dict[int, int], begun: float) -> None:
        """Add to a fault what must not be: damage used, whole checkpoints not whole, steps taken again."""
        wrong = [] if fault is None else fault.wrong
        for path in [path for path in self._damaged if _refused(path)]:
            del self._damaged[path]
        for path in sorted(self.save.glob("*/checkpoints/iter_*")):
            if path not in self._damaged and not path.name.endswith(".refused") and (faults := verify(path).faults):
                wrong.append(f"{path}: {faults}")
        for index, whole in before.items():
            again = [step.iteration for step in self._steps(index) if step.iteration <= whole and step.time > begun]
            if again:
                wrong.append(f"stage {index} had iteration {whole} and took {again} again")
        if fault is None and wrong:
            raise Survived(str(wrong))

    def _whole(self) -> dict[int, int]:
        return {index: self._whole_of(index) or 0 for index in range(2)}

    def _whole_of(self, index: int) -> int | None:
        """The newest iteration of a stage that is there, not ahead of the tracker, and was not damaged."""
        save, last = (stage := FamilyPaths(self.family).stage(index)).checkpoints, stage.last_iteration()
        passed = [number for number in iterations.published(save) if last is None or number <= last]
        return max((n for n in passed if iterations.iteration_path(save, n) not in self._damaged), default=None)

    def _taken(self, index: int) -> int:
        return max((step.iteration for step in self._steps(index)), default=0)

    def _steps(self, index: int) -> list[StepRecord]:
        path = FamilyPaths(self.family).stage(index).records
        return [record for record in records.read(path) if isinstance(record, StepRecord)]


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".refused")


def _refused(path: Path) -> bool:
    return _aside(path).is_dir()


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of its own, in memory; needs root."""
    with tempfile.TemporaryDirectory(prefix="megagrow-faults-") as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_BIG}", "tmpfs", place], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


def inject(wanted: int, seed: int, disk: Path, tell: Callable[[Fault], None]) -> list[Fault]:
    """Let so many faults happen, to one family after the other; return them."""
    chance, faults = random.Random(seed), []
    file = disk / "family.yaml"
    texts = [str(shutil.copytree(ROOT / name, disk / "text" / name)) for name in TEXTS]  # somebody may edit them
    data = {"sources": [{"name": "docs", "paths": texts}], "split": "90,9,1"}
    file.write_text(yaml.safe_dump({**FAMILY, "data": data, "save": str(disk / "quiet")}))
    code, text = kill_test.run(kill_test.command(file, []))
    if code:
        sys.exit(f"the family does not even run undisturbed:\n{text[-3000:]}")
    quiet = kill_test.bits(load(file))
    waiting = [kind for number in range(wanted) for kind in [list(KINDS)[number % len(KINDS)]]]
    chance.shuffle(waiting)
    for number in range(wanted):
        patient = Patient(file, disk / f"family-{number}", chance)
        patient.save.mkdir()
        (patient.save / "data").symlink_to(disk / "quiet" / "data", target_is_directory=True)
        hurt: list[Fault] = []
        while waiting and _one_more(patient, waiting, hurt):
            tell(hurt[-1])
        faults += hurt
        wrong = patient.finish()
        found = kill_test.bits(patient.family)
        wrong += [f"{key} differs" for key in sorted(quiet.keys() | found.keys()) if quiet.get(key) != found.get(key)]
        if wrong:
            raise Survived(f"after {[(fault.kind, fault.during, fault.moment) for fault in hurt]}: {wrong[:5]}")
        print(
            f"a family came through {len(hurt)} faults: {len(found)} losses and checkpoints as they must be", flush=True
        )
        shutil.rmtree(patient.save)
        if not waiting:
            break
    return faults


def _one_more(patient: Patient, waiting: list[str], hurt: list[Fault]) -> bool:
    """Let the first fault that waits and is possible now happen; False once the family is finished.

    Where only damage waits and there is nothing to damage yet, the run is killed once more than was asked for.
    """
    for kind in dict.fromkeys(waiting):
        fault = patient.hurt(kind)
        if fault is not None:
            waiting.remove(kind)
            hurt.append(fault)
            return True
        if kind not in ("cut", "flip"):
            return False  # it ended by itself
    if (fault := patient.hurt("run")) is not None:
        hurt.append(fault)
    return fault is not None


def table(faults: Sequence[Fault]) -> str:
    """The faults by kind, in markdown."""
    head = "| fault | times | in training / growth / else | over after, s (median, most) | steps lost (most) | wrong |"
    rows = [head, "|---|---|---|---|---|---|"]
    for kind, words in KINDS.items():
        of_kind = [fault for fault in faults if fault.kind == kind]
        if not of_kind:
            continue
        train = sum(fault.during == "train" for fault in of_kind)
        grow = sum(fault.during in _GROWTH for fault in of_kind)
        spans = [fault.seconds for fault in of_kind]
        span = "-" if kind in ("cut", "flip") else f"{statistics.median(spans):.1f}, {max(spans):.1f}"
        wrong = sum(bool(fault.wrong) for fault in of_kind)
        rows.append(f"| {words} | {len(of_kind)} | {train} / {grow} / {len(of_kind) - train - grow} | {span} | "
                    f"{max(fault.lost for fault in of_kind)} | {wrong} |")  # fmt: skip
    return "\n".join(rows)


def write(faults: Sequence[Fault], seed: int) -> None:
    """Write the table into docs/reliability.md, between its two marks."""
    text = PAGE.read_text(encoding="utf-8")
    words = f"{len(faults)} faults, seed {seed}, saved every {EVERY} steps, hang timeout {HANG_S} s:"
    block = f"<!-- faults:begin -->\n{words}\n\n{table(faults)}\n<!-- faults:end -->"
    PAGE.write_text(re.sub(r"<!-- faults:begin -->.*<!-- faults:end -->", lambda _: block, text, flags=re.DOTALL))


def main() -> int:
    """Entry point; return 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(description="Let faults happen to a tiny family, and count what they cost.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="append each fault to this file, and make the table of all in it")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    def tell(fault: Fault) -> None:
        print(f"{fault.kind} in {fault.during}, {fault.moment}: {fault.seconds:.1f} s, code {fault.code}, "
              f"{fault.lost} steps lost; {fault.line or '-'} {fault.wrong or ''}", flush=True)  # fmt: skip
        if asked.log:
            with open(asked.log, "a") as stream:
                stream.write(json.dumps(asdict(fault)) + "\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the disk is taken down
    with small_disk() as disk:
        faults = inject(asked.faults, asked.seed, disk, tell) if asked.faults else []
    if asked.log:
        faults = [Fault(**json.loads(line)) for line in asked.log.read_text().splitlines()]
    print(table(faults))
    if asked.write:
        write(faults, asked.seed)
    return 1 if any(fault.wrong for fault in faults) else 0


if __name__ == "__main__":
    sys.exit(main())
