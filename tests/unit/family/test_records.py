"""Records: appended records are read back, a kill damages at most the last line, a resumed run repeats no step."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow import records
from megagrow.errors import UserError
from megagrow.records import ConversionRecord, EvalRecord, JobRecord, Record, StageRecord, StepRecord


def step(iteration: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        time=1.5, stage="größe", iteration=iteration, loss=loss, grad_norm=0.5, learning_rate=1e-3,
        consumed_samples=iteration, consumed_tokens=8 * iteration, flops=1e20, tokens_per_second=3.25,
    )  # fmt: skip


def evaluation(iteration: int) -> EvalRecord:
    return EvalRecord(time=2, stage="a", iteration=iteration, loss=2, samples=4, consumed_tokens=8, flops=0)


def finished(iterations: int) -> StageRecord:
    return StageRecord(
        time=3, stage="a", iterations=iterations, parameters=7, stage_tokens=8, consumed_tokens=8, flops=1.0,
        first_loss=None, final_loss=2.0, checkpoint="x", seconds=1.0,
    )  # fmt: skip


CONVERSION = ConversionRecord(
    time=4, source="a", target="b", operators={"hidden": "zero_pad"}, moments="exact", exact=True, tensors=3,
    bytes_read=1, bytes_written=2, seconds=0.5,
)  # fmt: skip
JOB = JobRecord(time=5, job="train-a", event="failed", exit_code=2, seconds=1.0)
ONE_OF_EACH = [step(1), evaluation(1), finished(1), CONVERSION, JOB]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "records.jsonl"


def fill(path: Path, *given_records: Record) -> None:
    for record in given_records:
        records.append(path, record)


def test_every_kind_reads_back_equal(path: Path) -> None:
    assert list(records.read(path)) == []
    fill(path, *ONE_OF_EACH)
    assert list(records.read(path)) == ONE_OF_EACH
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["step", "eval", "stage", "conversion", "job"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2])
def test_numbers_come_back_to_the_last_bit(path: Path, value: float) -> None:
    fill(path, step(1, value))
    (found,) = records.read(path)
    assert isinstance(found, StepRecord)
    assert found.loss == value or (math.isnan(value) and math.isnan(found.loss))


@pytest.mark.parametrize("keep", [0, 1, 0.3, 0.99])
def test_a_half_written_last_line_is_skipped_and_ended(path: Path, keep: float) -> None:
    fill(path, step(1), step(2))
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[1][: int(keep)] if keep in (0, 1) else lines[1][: int(len(lines[1]) * keep)]
    path.write_bytes(lines[0] + torn)
    assert list(records.read(path)) == [step(1)]
    fill(path, step(2), step(3))
    assert list(records.read(path)) == [step(1), step(2), step(3)]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "records.jsonl"
    fill(path, *ONE_OF_EACH)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    os.truncate(path, cut)
    kept = ONE_OF_EACH[: whole[: cut + 1].count(b"\n")]  # a last line without its line end is complete
    assert list(records.read(path)) == kept
    fill(path, JOB)
    assert list(records.read(path)) == [*kept, JOB]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"kind": "novel", "time": 1}', "Input tag 'novel'"),
        ('{"time": 1}', "Unable to extract tag"),
        ('{"kind": "job", "time": 1, "job": "a", "event": "failed", "mood": "bad"}', "mood: Extra inputs"),
        ("[1]", "version: Input should be"),
    ],
)
def test_a_complete_line_that_is_not_a_record_is_named(path: Path, line: str, what: str) -> None:
    fill(path, JOB)
    with open(path, "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(UserError, match=rf"records\.jsonl: line 2 is not a record .*{what}"):
        list(records.read(path))


def test_rewind_removes_steps_that_will_be_repeated(path: Path) -> None:
    fill(path, JOB, step(1), evaluation(1), step(2), evaluation(2), step(3), finished(3), CONVERSION)
    records.rewind(path, 2)
    assert list(records.read(path)) == [JOB, step(1), evaluation(1), step(2), evaluation(2), CONVERSION]
    records.rewind(path, 2)
    records.rewind(path, 0)
    assert list(records.read(path)) == [JOB, CONVERSION]
    assert [file.name for file in path.parent.iterdir()] == ["records.jsonl"]
    records.rewind(path.with_name("none.jsonl"), 3)
    assert not path.with_name("none.jsonl").exists()


def test_rewind_to_the_end_keeps_the_finished_stage_and_drops_a_torn_line(path: Path) -> None:
    fill(path, step(1), step(2), finished(2))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "step", "ti')
    records.rewind(path, 2)
    assert path.read_bytes() == whole


def test_a_killed_rewind_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, step(1), step(2))
    whole = path.read_bytes()

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        records.rewind(path, 1)
    assert path.read_bytes() == whole


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        JOB.job = "other"  # type: ignore[misc]  # frozen: what is tested
    with pytest.raises(ValueError, match="Extra inputs"):
        JobRecord(time=1, job="a", event="failed", mood="bad")  # type: ignore[call-arg]  # no such field: what is tested
