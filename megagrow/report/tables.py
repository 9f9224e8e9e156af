"""Tables that can be shown in a terminal, as JSON and on the report page.

A `Table` holds raw values and a format for each column; `human` turns a value into text for people. The terminal and
the page show `20 B` where the JSON has 20000000000, and none of them computes anything else. Columns with `shown=False`
are in the JSON only. If a terminal is too narrow, the columns are split into blocks below each other, each with the
names of the rows, so that no column is dropped and no word is broken.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from megagrow.plan import FamilyPlan, StagePlan
from megagrow.plan.budget import Rule
from megagrow.report.collect import FamilyResult

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table as RichTable

CellValue = str | int | float | None
CellFormat = Literal[
    "text", "prose", "count", "integer", "flops", "rate", "loss", "difference", "share", "seconds", "bytes"
]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: name of the column in JSON.
        heading: name of the column for people.
        format: how its values are shown; `text` stays on one line, `prose` may be wrapped between words.
        shown: whether people see it; JSON has every column.
        starts_block: whether a terminal that is too narrow starts a new block here.
    """

    key: str
    heading: str
    format: CellFormat = "text"
    shown: bool = True
    starts_block: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of raw values, in the order of the columns; `totals` is a last row with sums."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[CellValue, ...], ...]
    totals: tuple[CellValue, ...] | None = None
    footnotes: tuple[str, ...] = ()


def plan_table(plan: FamilyPlan) -> Table:
    """The tokens and the cost of each stage by both rules, next to those of the same model trained alone."""
    nominal = any(stage.nominal_parameters for stage in plan.stages)
    columns = (
        Column("name", "stage"),
        Column("parameters", "params", "count"),
        Column("nominal_parameters", "nominal", "count", shown=nominal),
        Column("layout", "layout"),
        Column("world_size", "ranks", "integer"),
        Column("tokens_per_step", "tokens\nper step", "count"),
        Column("iterations", "steps", "integer"),
        Column("max_lr", "max lr", "rate"),
        Column("tokens", "tokens", "count", starts_block=True),
        Column("tokens_independent", "tokens\nalone", "count"),
        Column("flops_6nt", "FLOPs\n6NT", "flops"),
        Column("flops_independent_6nt", "alone\n6NT", "flops"),
        Column("flops_exact", "FLOPs\nexact", "flops"),
        Column("flops_independent_exact", "alone\nexact", "flops"),
    )
    rows: list[tuple[CellValue, ...]] = [
        (stage.name, stage.parameters, stage.nominal_parameters, stage.layout, stage.world_size)
        + (stage.tokens_per_step, stage.iterations, stage.peak_lr, stage.tokens, stage.tokens_independent)
        + (stage.flops.six_nt, stage.flops_independent.six_nt, stage.flops.exact, stage.flops_independent.exact)
        for stage in plan.stages
    ]
    iterations = sum(stage.iterations for stage in plan.stages)
    totals = ("family", None, None, None, None, None, iterations, None, plan.tokens, plan.tokens_independent)
    costs = (plan.flops.six_nt, plan.flops_independent.six_nt, plan.flops.exact, plan.flops_independent.exact)
    title = f"plan of {plan.name}"
    return Table(title=title, columns=columns, rows=tuple(rows), totals=totals + costs, footnotes=_plan_footnotes(plan))


def _plan_footnotes(plan: FamilyPlan) -> tuple[str, ...]:
    nominal = any(stage.nominal_parameters for stage in plan.stages)
    parameters = "the nominal number of parameters" if nominal else "the number of all parameters"
    loaded = tuple(_loaded(stage) for stage in plan.stages if stage.load is not None)
    return (
        f"The family saves {_saving(plan)}.",
        *loaded,
        "Alone: the same model, trained with all the FLOPs that the family has spent when this model is finished.",
        f"6NT: 6 N FLOPs per token, where N is {parameters}. Exact: matrices and the causal half of attention, layer "
        f"by layer. The budget is based on {'6NT' if plan.rule == '6NT' else 'exact FLOPs'}; recomputed activations "
        "are not counted; numbers of steps are rounded down.",
    )


def _loaded(stage: StagePlan) -> str:
    """What a stage begins with, and that its cost is sunk."""
    taken = "begins with" if stage.tokens else "is finished: it is"
    return f"Stage {stage.name} {taken} the checkpoint {stage.load}; what was spent on that before is counted nowhere."


def _saving(plan: FamilyPlan) -> str:
    """What the family saves by both rules, with both costs."""
    both: tuple[tuple[Rule, str], ...] = (("6NT", "by 6NT"), ("exact", "by exact FLOPs"))
    return " and ".join(
        f"{human(plan.saving(rule), 'share')} {name} ({human(plan.flops.by(rule), 'flops')} instead of "
        f"{human(plan.flops_independent.by(rule), 'flops')})"
        for rule, name in both
    )


def family_table(result: FamilyResult) -> Table:
    """The results of each stage: tokens, cost, and the validation loss around growth and at the end."""
    columns = (
        Column("name", "stage"),
        Column("state", "state"),
        Column("parameters", "params", "count"),
        Column("layout", "layout"),
        Column("precision", "precision", shown=False),
        Column("iterations", "steps", "integer"),
        Column("iterations_planned", "steps planned", "integer", shown=False),
        Column("tokens", "tokens", "count"),
        Column("tokens_planned", "of", "count"),
        Column("flops", "FLOPs", "flops"),
        Column("seconds", "time", "seconds", shown=False),
        Column("loss_before_growth", "parent's\nloss", "loss", starts_block=True),
        Column("loss_after_growth", "after\ngrowth", "loss"),
        Column("change_by_growth", "change", "difference"),
        Column("loss_at_end", "at the\nend", "loss"),
    )
    rows: list[tuple[CellValue, ...]] = [
        (stage.plan.name, stage.state, stage.parameters, stage.plan.layout, stage.precision)
        + (stage.iterations, stage.plan.iterations, stage.tokens, stage.plan.tokens, stage.flops, stage.seconds)
        + (stage.loss_before_growth, stage.loss_after_growth, stage.change_by_growth, stage.loss_at_end)
        for stage in result.stages
    ]
    steps = sum(stage.iterations for stage in result.stages)
    steps_planned = sum(stage.plan.iterations for stage in result.stages)
    totals = ("family", None, None, None, None, steps, steps_planned, result.tokens, result.plan.tokens)
    return Table(
        title=f"family {result.name}",
        columns=columns,
        rows=tuple(rows),
        totals=(*totals, result.flops, None, None, None, None, None),
        footnotes=_family_footnotes(result),
    )


def _family_footnotes(result: FamilyResult) -> tuple[str, ...]:
    losses = (
        "Validation losses are in nats per token, always on the same samples. FLOPs are those recorded in training."
    )
    if any(stage.state == "training" for stage in result.stages):
        losses += " For a stage in training, the loss at the end is its latest."
    spent = result.spent
    losses += "".join(f" {_loaded(stage)}" for stage in spent.stages if stage.load)
    if len(spent.stages) < 2:
        return (losses, "Nothing is saved yet: the first model costs as much as if trained alone.")
    whose = "Saved" if result.is_finished else f"Saved by the {len(spent.stages)} finished models"
    return (
        losses,
        f"{whose}: {_saving(spent)}, compared with training each model alone with all the FLOPs that the family has "
        "spent on it and its ancestors.",
    )


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """A table of facts, one per row: its name and its text."""
    columns = (Column("what", ""), Column("value", "", "prose"))
    return Table(title=title, columns=columns, rows=tuple(facts.items()))


def operators_text(operators: Mapping[str, str]) -> str:
    """Growth operators by axis, as text for people."""
    return ", ".join(f"{axis} {name}" for axis, name in operators.items())


def exactness_text(exact: bool, storage: str | None) -> str:
    """Whether a conversion preserves the function, and what storing does to the values (None: it is not known)."""
    promise = "exact" if exact else "does not preserve the function"
    if storage is None:
        return promise
    return f"{promise}, bit for bit: {storage}" if exact and storage.startswith("values") else f"{promise}; {storage}"


def as_json(table: Table) -> str:
    """The table as JSON: raw values of every column by key, totals and footnotes."""
    keys = [column.key for column in table.columns]

    def named(row: tuple[CellValue, ...]) -> dict[str, CellValue]:
        return dict(zip(keys, row, strict=True))

    content = {
        "title": table.title,
        "rows": [named(row) for row in table.rows],
        "totals": named(table.totals) if table.totals else None,
        "footnotes": list(table.footnotes),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def cells(table: Table, row: tuple[CellValue, ...]) -> list[str]:
    """The texts of a row for people: shown columns only."""
    pairs = zip(table.columns, row, strict=True)
    return [human(value, column.format) for column, value in pairs if column.shown]


def render_table(table: Table) -> "RenderableTable":
    """The table for a terminal; print it with `rich.console.Console().print(...)`."""
    return RenderableTable(table)


@dataclasses.dataclass(frozen=True)
class RenderableTable:
    """A table that rich can print, in as many blocks as the terminal's width requires."""

    table: Table

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yield title, blocks and footnotes."""
        from rich.text import Text

        def fits(columns: Sequence[int]) -> bool:
            block = _block(self.table, [0, *columns], max_prose_width=_MIN_PROSE_WIDTH)
            return console.measure(block, options=options.update(max_width=1000)).maximum <= options.max_width

        if self.table.title:
            yield Text(self.table.title, style="bold")
        columns = [index for index, column in enumerate(self.table.columns) if column.shown]
        for chosen in _blocks(self.table, columns[1:], fits):
            yield Text()
            yield _block(self.table, [columns[0], *chosen])
        if self.table.footnotes:
            yield Text()
        yield from (Text(note, style="dim") for note in self.table.footnotes)


def _blocks(table: Table, columns: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> list[Sequence[int]]:
    """Split columns, given by index, into blocks that fit: at a column that starts a block, else in the middle."""
    if len(columns) < 2 or fits(columns):
        return [columns]
    marked = (position for position, index in enumerate(columns) if position and table.columns[index].starts_block)
    cut = next(marked, len(columns) // 2)
    return _blocks(table, columns[:cut], fits) + _blocks(table, columns[cut:], fits)


def _block(table: Table, chosen: Sequence[int], max_prose_width: int | None = None) -> "RichTable":
    """Some columns of a table, by index; prose gets the remaining width, or at most `max_prose_width`."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    totals = table.totals or (None,) * len(table.columns)
    prose = any(table.columns[index].format == "prose" for index in chosen)
    drawn = RichTable(
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_header=any(table.columns[index].heading for index in chosen),
        show_footer=any(totals[index] is not None for index in chosen[1:]),
        footer_style="bold",
    )
    for index in chosen:
        column, total = table.columns[index], totals[index]
        drawn.add_column(
            Text(column.heading),
            footer=Text("" if total is None else human(total, column.format)),
            justify="left" if column.format in _TEXT_FORMATS else "right",
            vertical="top" if prose else "bottom",
            no_wrap=column.format != "prose",
            max_width=max_prose_width if column.format == "prose" else None,
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*(Text(human(row[index], table.columns[index].format)) for index in chosen))
    return drawn


_TEXT_FORMATS = ("text", "prose")
_MIN_PROSE_WIDTH = 24  # columns; if prose would get narrower, the table is split into blocks
_MISSING = "–"
_COUNT_SUFFIXES = (("", 1.0), (" k", 1e3), (" M", 1e6), (" B", 1e9), (" T", 1e12))


def human(value: CellValue, cell_format: CellFormat) -> str:
    """A value as text for people: 20 B, 1.20e20, 8.00e-4, 24.7 %, 5.2 h; a dash for None."""
    if value is None:
        return _MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    if cell_format == "count":
        return _count(value)
    if cell_format == "bytes":
        return _count(value).replace("B", "G") + "B" if value >= 1000 else f"{value:.0f} B"
    if cell_format == "seconds":
        return _seconds(value)
    if cell_format in ("flops", "rate"):
        return _power(value, ".2e")
    if cell_format == "difference":
        return _power(value, "+.1e") if abs(value) < 5e-5 else f"{value:+.4f}"
    if cell_format == "share":
        return f"{100 * value:.1f} %"
    return format(value, {"integer": ",.0f", "loss": ".4f"}.get(cell_format, "g"))


def _power(value: float, digits: str) -> str:
    """Scientific notation without padding of the exponent: 1.20e20, 8.00e-4."""
    mantissa, exponent = format(value, digits).split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _count(value: float) -> str:
    """Three digits and a suffix: 997 M, 2.00 B, but 2 B if that is exact; rounded first, so never 1000 M."""
    rounded = float(f"{value:.3g}")
    suffix, size = max(
        (pair for pair in _COUNT_SUFFIXES if pair[1] <= max(abs(rounded), 1.0)), key=lambda pair: pair[1]
    )
    digits = f"{rounded / size:.3g}" if rounded == value else f"{rounded / size:#.3g}".rstrip(".")
    return digits + suffix


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
