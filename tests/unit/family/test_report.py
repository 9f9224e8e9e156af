"""The report on records fabricated in a directory, with the family in different states."""

import html.parser
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megagrow import extras, records
from megagrow.cli import output
from megagrow.config import Batch, Family, ModelShape, ParallelLayout, Stage, load
from megagrow.config.family import Data, DataSource
from megagrow.errors import UserError
from megagrow.plan import family_plan
from megagrow.report import (
    Column,
    Table,
    as_json,
    collect,
    family_table,
    plan_table,
    render_page,
    render_table,
    write_report,
)
from megagrow.report.figures import smoothed
from megagrow.report.tables import human

EXAMPLE = Path(__file__).parents[3] / "examples" / "llama_1b_to_8b" / "family.yaml"
STEP = 32  # tokens of an optimizer step
FLOPS = 1e6  # of a step, as recorded


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Two stages of 20 and 10 steps with equal nominal cost a step in the ratio 1 to 2."""

    def stage(name: str, nominal: float, steps: int) -> Stage:
        sizes = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
        model = ModelShape(**sizes, vocab_size=100, seq_length=16, nominal_parameters=nominal)
        batch = Batch(micro_batch_size=1, global_batch_size=2)
        layout = ParallelLayout(tensor_model_parallel_size=2)
        return Stage(name=name, model=model, batch=batch, parallel=layout, train_tokens=steps * STEP, precision="fp32")

    data = Data(sources=(DataSource(prefix="x"),))
    stages = (stage("small", 1e3, 20), stage("large", 2e3, 10))
    return Family(name="tiny-family", save=tmp_path / "save", data=data, stages=stages)


def train(family: Family, index: int, losses: list[float], consumed: int, finish: bool) -> None:
    """Write the records of a stage: one per step, and an evaluation before the first and after every fifth step."""
    stage = family.stages[index]
    path = family.save / stage.name / "records.jsonl"
    for iteration, loss in enumerate(losses):
        tokens = consumed + iteration * STEP
        where = {"stage": stage.name, "iteration": iteration, "consumed_tokens": tokens, "flops": iteration * FLOPS}
        if iteration:
            rates = {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1e3}
            step = records.StepRecord(time=100, loss=loss + 0.01, consumed_samples=tokens // 16, **rates, **where)
            records.append(path, step)
        if iteration % 5 == 0:
            records.append(path, records.EvalRecord(time=100, loss=loss, samples=4, **where))
    if finish:
        steps = len(losses) - 1
        end = records.StageRecord(
            time=200, stage=stage.name, iterations=steps, parameters=4321 + index, stage_tokens=steps * STEP,
            consumed_tokens=consumed + steps * STEP, flops=steps * FLOPS, first_loss=losses[0], final_loss=losses[-1],
            checkpoint=str(family.save / stage.name), seconds=12.5,
        )  # fmt: skip
        records.append(path, end)


def grow(family: Family) -> None:
    record = records.ConversionRecord(
        time=150, source=f"{family.save}/small/checkpoints/iter_0000020",
        target=f"{family.save}/large/checkpoints/iter_0000000",
        operators={"hidden": "zero_pad", "layer": "identity"}, moments="asymmetric", exact=True, tensors=77,
        bytes_read=1000, bytes_written=2000, seconds=3.0,
    )  # fmt: skip
    records.append(family.save / "records.jsonl", record)


SMALL = [4.0 - 0.1 * step for step in range(21)]  # ends at 2.0
LARGE = [2.25 - 0.05 * step for step in range(11)]  # starts at 2.25, ends at 1.75


def finish(family: Family) -> None:
    train(family, 0, SMALL, 0, finish=True)
    grow(family)
    train(family, 1, LARGE, 20 * STEP, finish=True)


class Page(html.parser.HTMLParser):
    """Rows of tables as lists of texts, and everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip()


# Collecting -----------------------------------------------------------------------------------------------------------


def test_finished_family(family: Family) -> None:
    finish(family)
    result = collect(family)
    small, large = result.stages
    assert result.is_finished and [small.state, large.state] == ["finished", "finished"]
    assert (small.parameters, large.parameters) == (4321, 4322)
    assert (large.iterations, large.tokens, large.flops, large.seconds) == (10, 10 * STEP, 10 * FLOPS, 12.5)
    assert small.loss_before_growth is None and small.loss_after_growth is None
    assert large.loss_before_growth == pytest.approx(2.0)
    assert large.loss_after_growth == 2.25
    assert large.change_by_growth == pytest.approx(0.25)
    assert large.loss_at_end == pytest.approx(1.75)
    assert large.growth is not None and small.growth is None
    # 20 steps of cost 1 and 10 of cost 2: alone 20 + 40, as a family 40
    assert result.spent.saving() == pytest.approx(1 / 3)
    assert result.flops == 30 * FLOPS
    assert result.last_time == 200


def test_curves_continue_over_the_stages(family: Family) -> None:
    finish(family)
    small, large = collect(family).stages
    assert [point.tokens for point in large.validation] == [20 * STEP, 25 * STEP, 30 * STEP]
    assert [point.flops for point in large.validation] == [20 * FLOPS, 25 * FLOPS, 30 * FLOPS]
    assert small.training[-1].flops == large.validation[0].flops
    assert len(small.training) == 20 and small.training[0].loss == pytest.approx(3.91)


def test_family_that_has_not_started(family: Family) -> None:
    result = collect(family)
    assert [stage.state for stage in result.stages] == ["waiting", "waiting"]
    assert result.stages[0].loss_at_end is None and result.last_time is None and not result.is_finished
    assert "No losses yet" in render_page(result)


def test_family_in_its_second_stage(family: Family) -> None:
    train(family, 0, SMALL, 0, finish=True)
    grow(family)
    assert collect(family).stages[1].state == "grown"
    train(family, 1, LARGE[:7], 20 * STEP, finish=False)
    result = collect(family)
    large = result.stages[1]
    assert large.state == "training" and large.iterations == 6 and large.tokens == 6 * STEP
    assert large.loss_at_end == pytest.approx(2.0)  # the evaluation after step 5
    assert large.seconds is None and not result.is_finished
    assert [stage.name for stage in result.spent.stages] == ["small"], "an unfinished model has not saved anything yet"
    assert "1 of 2 finished" in render_page(result)


def test_torn_and_skipped_steps(family: Family) -> None:
    train(family, 0, SMALL[:4], 0, finish=False)
    path = family.save / "small" / "records.jsonl"
    step = records.StepRecord(
        time=1, stage="small", iteration=4, loss=99.0, grad_norm=1, learning_rate=1, consumed_samples=8,
        consumed_tokens=4 * STEP, flops=4 * FLOPS, tokens_per_second=1, skipped=True,
    )  # fmt: skip
    records.append(path, step)
    with open(path, "a") as stream:
        stream.write('{"kind": "step", "sta')
    small = collect(family).stages[0]
    assert small.iterations == 4 and small.flops == 4 * FLOPS
    assert all(point.loss < 5 for point in small.training)


def test_the_last_event_of_a_job_decides_whether_it_is_listed_as_failed(family: Family) -> None:
    events = [("train-small", "failed"), ("train-small", "finished"), ("grow <large>", "interrupted")]
    for job, event in events:
        records.append(family.save / "records.jsonl", records.JobRecord(time=1, job=job, event=event, detail="why"))
    result = collect(family)
    assert [job.job for job in result.failed_jobs] == ["grow <large>"]
    assert "Job grow &lt;large&gt; interrupted: why" in render_page(result)


# Tables ---------------------------------------------------------------------------------------------------------------


def printed(table: object, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(text: str, name: str, nth: int = 0) -> list[str]:
    """Words of the nth line that starts with a row's name."""
    return [row.split() for row in text.splitlines() if row.startswith(name)][nth]


def test_plan_table_is_human_in_a_terminal_and_raw_in_json() -> None:
    table = plan_table(family_plan(load(EXAMPLE)))
    text = printed(render_table(table), width=130)
    shape = "8b 8.03 B 8 B TP4 PP2 DP16 SP 128 4.19 M 28,610 2.83e-4".split()
    cost = "120 B 160 B 5.76e21 7.68e21 6.18e21 8.24e21".split()
    assert line(text, "8b") == shape + cost, "one line where there is room"
    assert "saves 24.7 % by 6NT (7.68e21 instead of 1.02e22)" in text and "by exact FLOPs (8.25e21 instead of" in text
    narrow = printed(render_table(table), width=80)
    assert line(narrow, "8b") == shape and line(narrow, "8b", 1) == ["8b", *cost], "two blocks where there is not"
    assert line(narrow, "family", 1) == "family 230 B 300 B 7.68e21 1.02e22 8.25e21 1.10e22".split()
    content = json.loads(as_json(table))
    eight = content["rows"][-1]
    assert (eight["tokens"], eight["nominal_parameters"], eight["iterations"]) == (120_000_000_000, 8e9, 28610)
    assert eight["parameters"] == 8_030_261_248 and eight["flops_exact"] > eight["flops_6nt"]
    assert content["totals"]["flops_independent_6nt"] == pytest.approx(6e18 * (20 + 2 * 40 + 4 * 80 + 8 * 160))


def test_nominal_parameters_are_shown_where_given(family: Family) -> None:
    stages = tuple(
        stage.model_copy(update={"model": stage.model.model_copy(update={"nominal_parameters": None})})
        for stage in family.stages
    )
    unnamed = family.model_copy(update={"stages": stages})
    assert "nominal" in printed(render_table(plan_table(family_plan(family))))
    assert "nominal" not in printed(render_table(plan_table(family_plan(unnamed))))


def test_family_table_shows_growth(family: Family) -> None:
    finish(family)
    table = family_table(collect(family))
    assert line(printed(render_table(table)), "large")[-4:] == ["2.0000", "2.2500", "+0.2500", "1.7500"]
    raw = json.loads(as_json(table))["rows"][1]
    assert (raw["precision"], raw["layout"], raw["tokens_planned"], raw["seconds"]) == ("fp32", "TP2", 320, 12.5)
    assert raw["change_by_growth"] == pytest.approx(0.25)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 110, 120, 200])
def test_tables_fit_without_a_broken_word(family: Family, width: int) -> None:
    finish(family)
    for table in (family_table(collect(family)), plan_table(family_plan(load(EXAMPLE)))):
        text = printed(render_table(table), width)
        assert max(map(len, text.splitlines())) <= width
        words = text.split()
        for row in (*table.rows, table.totals or ()):
            pairs = zip(table.columns, row, strict=False)
            shown = [human(value, column.format) for column, value in pairs if column.shown and value is not None]
            assert {part for cell in shown for part in cell.split()} <= set(words), "every value is there, whole"
        assert "…" not in text
        assert [row for row in text.splitlines() if "TP4 PP2 DP16 SP" in row or "TP2" in row], (
            "layouts stay in one piece"
        )


def test_prose_wraps_between_words() -> None:
    words = "heads are copied in turn and their readers share the effect of a head".split()
    table = Table(
        title="", columns=(Column("what", ""), Column("value", "", "prose")), rows=(("new", " ".join(words)),)
    )
    text = printed(render_table(table), width=30)
    assert text.split() == ["new", *words] and max(map(len, text.splitlines())) <= 30
    assert text.strip().startswith("new"), "a name is next to the first line of its text"
    columns = (Column("what", "what"), Column("steps", "steps", "integer"), Column("value", "why", "prose"))
    wide = Table(title="", columns=columns, rows=(("new", 28610, " ".join(words)),))
    assert line(printed(render_table(wide), width=60), "new")[:3] == ["new", "28,610", "heads"], "in one block"


def test_width_is_fixed_if_output_is_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output.console().width == 110
    monkeypatch.setenv("COLUMNS", "80")
    assert output.console().width == 80, "COLUMNS sets the width"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (20e9, "count", "20 B"),
        (997_637_632, "count", "998 M"),
        (999_999_999, "count", "1.00 B"),
        (1_997_637_632, "count", "2.00 B"),
        (999, "count", "999"),
        (0, "count", "0"),
        (230e9, "count", "230 B"),
        (28e9, "bytes", "28 GB"),
        (2000, "bytes", "2 kB"),
        (512, "bytes", "512 B"),
        (1.2e20, "flops", "1.20e20"),
        (0.0, "flops", "0"),
        (8e-4, "rate", "8.00e-4"),
        (28610, "integer", "28,610"),
        (0.2470588, "share", "24.7 %"),
        (2.0, "loss", "2.0000"),
        (0.25, "difference", "+0.2500"),
        (-2e-7, "difference", "-2.0e-7"),
        (0.0, "difference", "0"),
        (90, "seconds", "90.0 s"),
        (7100, "seconds", "118.3 min"),
        (72000, "seconds", "20.0 h"),
        (None, "loss", "–"),
        ("x", "text", "x"),
    ],
)
def test_human(value: str | float | None, unit: Any, text: str) -> None:
    assert human(value, unit) == text


# The page -------------------------------------------------------------------------------------------------------------


def test_page_has_all_results_and_loads_nothing(family: Family, tmp_path: Path) -> None:
    finish(family)
    path = tmp_path / "out" / "report.html"
    write_report(family, path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert ["large", "finished", "4.32 k", "TP2", "10", "320", "320", "1.00e7"] in [row[:8] for row in page.rows]
    assert ["2.0000", "2.2500", "+0.2500", "1.7500"] in [row[-4:] for row in page.rows]
    grown = next(row for row in page.rows if row and row[0].startswith("small/"))
    assert grown == [
        "small/iter_0000020 → large/iter_0000000",
        "hidden zero_pad, layer identity", "asymmetric", "exact", "77", "2 kB", "3.0 s",
    ]  # fmt: skip
    assert "2 models, small to large" in text and "33.3 % less" in text
    assert page.tags.count("svg") == 2 and "script" not in page.tags and "link" not in page.tags
    assert all(load.startswith("#") for load in page.loads), "only references inside the page"
    assert {load[1:] for load in page.loads} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids), "the two figures have different ids"
    assert "@import" not in text and "url(http" not in text
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


def test_colors_of_curves_are_the_page_s(family: Family) -> None:
    finish(family)
    text = render_page(collect(family))
    svg = text[text.index("<svg") : text.rindex("</svg>")]
    for variable in ("--ink", "--muted", "--grid", "--band", "--training", "--validation"):
        assert f"var({variable})" in svg and f"{variable}: #" in text


def test_page_with_few_losses(family: Family) -> None:
    """The page can be rendered after one evaluation and after one step."""
    train(family, 0, SMALL[:1], 0, finish=False)
    assert "No losses yet" in render_page(collect(family))
    train(family, 0, SMALL[:2], 0, finish=False)
    assert Page(render_page(collect(family))).tags.count("svg") == 2


def test_report_that_cannot_be_written_is_one_line(family: Family, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/report\.html: the report cannot be written"):
        write_report(family, tmp_path / "file" / "report.html")


def test_smoothing_averages_without_a_false_start() -> None:
    assert smoothed([3.0, 3.0, 3.0], window=10) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 2.0, 4.0], window=1) == [1.0, 2.0, 4.0]
    assert smoothed([0.0, 1.0], window=2) == pytest.approx([0.0, 2 / 3])


def test_without_matplotlib_the_page_says_how_to_get_curves(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    train(family, 0, [5.0 - 0.1 * step for step in range(21)], 0, finish=True)
    assert "<svg" in render_page(collect(family))
    monkeypatch.setattr(extras, "is_installed", lambda package: package != "matplotlib")
    page = render_page(collect(family))
    assert "<svg" not in page and "matplotlib is not installed: pip install" in page
    assert "nothing has been trained" not in page
