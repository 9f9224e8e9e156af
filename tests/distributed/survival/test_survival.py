"""Training that survives: losses that are not finite, a time limit, ranks that are killed or hang.

Bad numbers come from single samples: wherever one of the poisoned samples is in a batch, its loss is NaN, on the one
rank that reads it. One start of two ranks runs all those cases. What needs processes of its own comes after that:
a rank that is stopped, a rank that is killed while a checkpoint is written in the background; and the same bits.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from megagrow import records
from megagrow.checkpoint.directory import integrity, iterations, recovery
from megagrow.checkpoint.directory.manifest import read_manifest, write_manifest
from megagrow.config import load
from megagrow.data.stream import Position
from megagrow.records import RollBackRecord, StepRecord
from megagrow.slurm_step import JOB_END_TIME
from megagrow.training.watchdog import HUNG
from tests.distributed.ranks import families
from tests.distributed.ranks.families import BATCH, LLAMA, TOKENS_PER_STEP, Said, verb
from tests.distributed.ranks.launcher import run_ranks
from tests.distributed.survival.test_run import start
from tools.proofs import kill_test

pytestmark = pytest.mark.timeout(900)
STEPS, EVERY, LONG = 8, 3, 40
SMALL = LLAMA | {"num_layers": 2}
SKIP = ("training.non_finite=skip", "training.non_finite_limit=2")
BACK = ("training.non_finite=roll_back", "training.non_finite_limit=2")
HANG_S = 8
# case: (poisoned steps, overrides)
CASES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "quiet": ((), ()),
    "stop": ((5,), ()),
    "skip": ((5,), (*SKIP, "checkpoint.save_interval=1")),
    "skip too often": ((5, 6, 7), (*SKIP, "checkpoint.save_interval=1")),
    "roll back": ((5,), BACK),
    "roll back to the start": ((2,), BACK),
    "roll back twice": ((5, 6), BACK),
    "roll back too often": ((5, 6, 7), BACK),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of all cases: family.yaml files, and a directory per case."""
    directory = tmp_path_factory.mktemp("survival")
    text = families.write_text(directory / "text.jsonl", 100)
    for name, steps in (("short", STEPS), ("long", LONG)):
        stage = families.stage("small", SMALL, "DP2", train_tokens=steps * TOKENS_PER_STEP)
        saves = {"save_interval": EVERY if name == "short" else 10, "keep": 20}
        families.write_family(directory / name, text, [stage], checkpoint=saves, evaluation={"eval_samples": 8})
    return directory


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Said]:
    """Results of all cases, from one start of two ranks."""
    found: dict[str, Said] = run_ranks("tests.distributed.survival.test_survival:work", 2, root)[0]
    return found


def place(root: Path, case: str) -> Path:
    """Directory that a case saves in."""
    return root / case.replace(" ", "-")


def work(root: Path) -> dict[str, Said]:
    """The part of each of two ranks; rank 0 prepares and copies, and a start of a stage waits for it."""
    main = os.environ["RANK"] == "0"
    if main:
        assert verb_alone("data", root / "short.yaml").code == 0
        (root / "short" / "data").rename(root / "data")
    results = {case: train(root, case, *CASES[case]) for case in CASES}
    for case, iteration, poisoned in (("skip", 3, (5,)), ("skip too often", 6, (7,)), ("roll back", 3, (5,)),
                                      ("roll back", 6, ())):  # fmt: skip
        copy = f"{case} from {iteration}"
        if main:
            families.rewind(place(root, case), place(root, copy), "small", iteration)
        results[copy] = train(root, copy, poisoned, CASES[case][1])
    if main:
        families.rewind(place(root, "roll back"), place(root, "by hand"), "small", 3)
        advance_data(place(root, "by hand") / "small" / "checkpoints" / "iter_0000003", 2 * BATCH)
    results["by hand"] = train(root, "by hand", (), ())
    with mock.patch.dict(os.environ, {JOB_END_TIME: str(int(time.time()))}):
        results["late"] = train(root, "late", (), ())
    results["late again"] = train(root, "late", (), ())
    results["long"] = train(root, "long", (), (), "long.yaml")
    return results


def verb_alone(*arguments: Any) -> Said:
    """A verb of one rank that needs none of the others."""
    with mock.patch.dict(os.environ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            os.environ.pop(name)
        return verb(*arguments)


def train(
    root: Path, case: str, poisoned: tuple[int, ...], overrides: tuple[str, ...], file: str = "short.yaml"
) -> Said:
    """Train the stage in the directory of a case, with the last sample of each of some steps poisoned."""
    save = place(root, case)
    if os.environ["RANK"] == "0" and not (save / "data").exists():
        families.lend(root / "data", save)
    with poison(root, [step * BATCH - 1 for step in poisoned]):
        return verb("train", root / file, "--stage", "small", f"save={save}", *overrides)


@contextlib.contextmanager
def poison(root: Path, samples: list[int]) -> Iterator[None]:
    """Make the loss NaN wherever a micro-batch contains one of these samples of the stream."""
    from megagrow.data.record import read_prepared
    from megagrow.data.stream import TrainStream
    from megagrow.training import engine

    right = engine._forward_step
    while samples and not (root / "data" / "prepared.json").exists():
        time.sleep(0.1)
    family = load(root / "short.yaml", [f"save={root}"])
    stream = TrainStream(read_prepared(family), family) if samples else None
    wrong = [stream.sample(index)["tokens"] for index in samples] if stream else []

    def forward(batches: Any, chunk: Any, *, context: int) -> Any:
        batch = next(batches)
        output, mean = right(iter([batch]), chunk, context=context)
        bad = any(row.equal(tokens) for row in batch["tokens"] for tokens in wrong)
        return (output * float("nan") if bad else output), mean

    with mock.patch.object(engine, "_forward_step", forward):
        yield


def advance_data(checkpoint: Path, samples: int) -> None:
    """Advance a checkpoint's position in the data by some samples, and seal it again."""
    manifest = read_manifest(checkpoint)
    position = Position.from_dict(manifest.position)
    further = {"made": position.total + samples}
    tokens = manifest.consumed_tokens + samples * families.SEQUENCE
    write_manifest(checkpoint, manifest.model_copy(update={
        "position": further, "consumed_samples": position.total + samples, "consumed_tokens": tokens,
    }))  # fmt: skip
    integrity.seal(checkpoint)


def steps_of(root: Path, case: str) -> list[StepRecord]:
    """Steps of a case on record."""
    return families.steps(load(root / "short.yaml", [f"save={place(root, case)}"]))


def digest(root: Path, case: str, iteration: int = STEPS) -> str:
    """Digest of a checkpoint of a case."""
    return kill_test.digest(iterations.iteration_path(place(root, case) / "small" / "checkpoints", iteration))


def story(root: Path, case: str) -> list[tuple[int, str, bool, int]]:
    """Recorded steps of a case, in a form that is comparable even if a loss is NaN."""
    return [(step.iteration, repr(step.loss), step.skipped, step.consumed_samples) for step in steps_of(root, case)]


def roll_backs(root: Path, case: str) -> list[RollBackRecord]:
    """Recorded roll backs of a case."""
    path = place(root, case) / "small" / "records.jsonl"
    return [record for record in records.read(path) if isinstance(record, RollBackRecord)]


def test_a_step_that_is_not_finite_stops_the_stage_with_one_line(root: Path, results: dict[str, Said]) -> None:
    assert results["quiet"].code == 0, results["quiet"].text
    assert results["stop"].code == 2 and "Traceback" not in results["stop"].text
    (line,) = [line for line in results["stop"].text.splitlines() if line.startswith("megagrow: error: ")]
    assert "loss nan and gradient norm nan at iteration 5" in line and "checkpoint is iteration 3" in line
    assert story(root, "stop") == story(root, "quiet")[:4]
    assert digest(root, "stop", 3) == digest(root, "quiet", 3)


def test_a_skipped_step_changes_no_weight_or_moment_and_moves_the_data(root: Path, results: dict[str, Said]) -> None:
    assert results["skip"].code == 0, results["skip"].text
    assert digest(root, "skip", 4) == digest(root, "skip", 5) != digest(root, "skip", 6)
    assert [step.skipped for step in steps_of(root, "skip")] == [step == 5 for step in range(1, STEPS + 1)]
    assert [step.consumed_samples for step in steps_of(root, "skip")] == [BATCH * n for n in range(1, STEPS + 1)]
    assert story(root, "skip from 3") == story(root, "skip") != story(root, "quiet")
    assert digest(root, "skip from 3") == digest(root, "skip") != digest(root, "quiet")


def test_so_many_skipped_in_a_row_are_too_many_even_across_a_restart(root: Path, results: dict[str, Said]) -> None:
    for case in ("skip too often", "skip too often from 6"):
        result = results[case]
        assert result.code == 2 and "iteration 7, after 2 skipped in a row" in result.text, result.text


def test_a_stage_goes_back_to_its_last_checkpoint_and_on_with_the_data(root: Path, results: dict[str, Said]) -> None:
    assert results["roll back"].code == results["by hand"].code == 0, results["roll back"].text
    (record,) = roll_backs(root, "roll back")
    assert (record.iteration, record.bad_iteration, record.passed_over, record.number) == (4, 5, 2 * BATCH, 1)
    samples = [step.consumed_samples for step in steps_of(root, "roll back")]
    assert samples == [BATCH * (n if n <= 3 else n + 2) for n in range(1, STEPS + 1)]
    assert story(root, "roll back") == story(root, "by hand") != story(root, "quiet")
    assert digest(root, "roll back") == digest(root, "by hand") != digest(root, "quiet")


@pytest.mark.parametrize(("case", "iteration"), [("roll back", 3), ("roll back", 6)])
def test_a_run_that_went_back_resumes_to_the_same_bits(
    case: str, iteration: int, root: Path, results: dict[str, Said]
) -> None:
    copy = f"{case} from {iteration}"
    assert results[copy].code == results[case].code == 0, results[copy].text
    assert story(root, copy) == story(root, case) and digest(root, copy) == digest(root, case)
    first, again = roll_backs(root, case), roll_backs(root, copy)
    assert [r.model_dump(exclude={"time", "loss", "grad_norm"}) for r in first] == [
        r.model_dump(exclude={"time", "loss", "grad_norm"}) for r in again
    ]


def test_a_stage_may_go_back_to_one_checkpoint_twice_and_remembers_both(root: Path, results: dict[str, Said]) -> None:
    assert results["roll back twice"].code == 0, results["roll back twice"].text
    first = roll_backs(root, "roll back twice")
    # the sample that was in step 6 is in step 4 once two steps' samples have been passed over
    assert [(record.bad_iteration, record.passed_over) for record in first] == [(5, 2 * BATCH), (4, 3 * BATCH)]
    assert [record.number for record in first] == [1, 2]
    assert steps_of(root, "roll back twice")[-1].consumed_samples == (STEPS + 3) * BATCH


def test_a_stage_without_a_checkpoint_goes_back_to_its_start(root: Path, results: dict[str, Said]) -> None:
    assert results["roll back to the start"].code == 0, results["roll back to the start"].text
    (record,) = roll_backs(root, "roll back to the start")
    assert (record.iteration, record.bad_iteration, record.passed_over) == (1, 2, 2 * BATCH)
    assert digest(root, "roll back to the start", 0) != digest(root, "roll back to the start")
    assert families.validation(load(root / "short.yaml", [f"save={place(root, 'roll back to the start')}"])).keys() == {
        0, STEPS,
    }  # fmt: skip


def test_going_back_too_often_stops_the_stage(root: Path, results: dict[str, Said]) -> None:
    words = results["roll back too often"]
    assert words.code == 2 and "after going back 2 times" in words.text and "Traceback" not in words.text, words.text
    assert recovery.newest_whole(place(root, "roll back too often") / "small" / "checkpoints") is not None


def test_a_stage_whose_time_is_up_saves_and_resumes(root: Path, results: dict[str, Said]) -> None:
    assert results["late"].code == 0 and "stopped by the time limit after iteration 1; saved" in results["late"].text
    assert results["late again"].code == 0 and story(root, "late") == story(root, "quiet")
    assert digest(root, "late") == digest(root, "quiet")


def test_a_rank_that_hangs_or_dies_ends_the_job_in_time_and_it_resumes(root: Path, results: dict[str, Said]) -> None:
    save = root / "disturbed"
    families.lend(root / "data", save)
    line: tuple[Any, ...] = ("train", root / "long.yaml", "--stage", "small", f"save={save}")
    short = f"training.hang_timeout_seconds={HANG_S}"
    after, code, text = strike(save, (*line, short), lambda: steps_on_record(save) >= 3, signal.SIGSTOP, "1")
    assert code == HUNG and after < HANG_S + 30, text
    assert "megagrow: error: rank 0: step " in text and f"has not ended after {HANG_S} s" in text
    assert "_forward_backward" in text or "engine.py" in text, "no stacks"

    line = (*line, "checkpoint.async_save=true", "checkpoint.save_interval=4")
    after, code, text = strike(
        save, line, lambda: steps_on_record(save) >= 3 and being_written(save), signal.SIGKILL, "0"
    )
    assert code and after < 30, text
    assert "megagrow: error: rank 0 was killed by SIGKILL" in text and "Traceback" not in text
    kill_test.check_published(save)

    process = start(*line, ranks=2)
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0, text
    quiet, found = (kill_test.bits(load(root / "long.yaml", [f"save={path}"])) for path in (root / "long", save))
    assert found == quiet and len(found) == LONG + 2 + 1


def strike(save: Path, line: tuple[Any, ...], ready: Any, number: signal.Signals, rank: str) -> tuple[float, int, str]:
    """Start two ranks, send one of them a signal when it is time; (seconds until all was over, exit code, output)."""
    process = start(*line, ranks=2)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.002)
        children = psutil.Process(process.pid).children()
        (victim,) = [child for child in children if child.environ().get("RANK") == rank]
        struck = time.monotonic()
        victim.send_signal(number)
        text = process.communicate(timeout=120)[0]
        after = time.monotonic() - struck
    finally:
        process.kill()
    while any(kill_test.orphans(save)):
        assert time.monotonic() < struck + after + 10, kill_test.orphans(save)
        time.sleep(0.05)
    return after, process.returncode, text


def steps_on_record(save: Path) -> int:
    """Number of recorded steps; polled often."""
    path = save / "small" / "records.jsonl"
    return path.read_bytes().count(b'"kind":"step"') if path.exists() else 0


def being_written(save: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(save.glob("small/checkpoints/.iter_*.staging-*/*.distcp"))
