"""One table, three looks: a terminal's, JSON's and the page's.

A `Table` holds raw values and says of each column what unit it is in; `human` turns a value into text for people.
So the terminal and the page show `20 B` where the JSON has 20000000000, and none of them computes anything. Some
columns are for programs only (`shown=False`), which keeps the terminal's table within 110 characters.
"""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Literal

from megagrow.plan import FamilyPlan
from megagrow.report.collect import FamilyResult

if TYPE_CHECKING:
    from rich.console import Group

Value = str | int | float | None
Unit = Literal["text", "count", "integer", "flops", "rate", "loss", "difference", "share", "seconds", "bytes"]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: the key in JSON, the heading for people, the unit of its values."""

    key: str
    heading: str
    unit: Unit = "text"
    shown: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Raw values by row, in the order of the columns; `totals` is a last row where sums make sense."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    totals: tuple[Value, ...] | None = None
    footnotes: tuple[str, ...] = ()


def plan_table(plan: FamilyPlan) -> Table:
    """What each stage will train on, at what cost, beside the same model trained alone."""
    columns = (
        Column("name", "stage"),
        Column("parameters", "params", "count"),
        Column("nominal_parameters", "nominal", "count", shown=False),
        Column("layout", "layout"),
        Column("world_size", "ranks", "integer"),
        Column("tokens_per_step", "tokens\na step", "count"),
        Column("iterations", "steps", "integer"),
        Column("max_lr", "max lr", "rate"),
        Column("tokens", "tokens", "count"),
        Column("tokens_independent", "tokens\nalone", "count"),
        Column("flops_6nt", "FLOPs", "flops", shown=plan.rule == "6NT"),
        Column("flops_exact", "FLOPs", "flops", shown=plan.rule == "exact"),
        Column("flops_independent_6nt", "FLOPs\nalone", "flops", shown=plan.rule == "6NT"),
        Column("flops_independent_exact", "FLOPs\nalone", "flops", shown=plan.rule == "exact"),
    )
    rows: list[tuple[Value, ...]] = [
        (stage.name, stage.parameters, stage.nominal_parameters, stage.layout, stage.world_size)
        + (stage.tokens_per_step, stage.iterations, stage.max_lr, stage.tokens, stage.tokens_independent)
        + (stage.flops.six_nt, stage.flops.exact, stage.flops_independent.six_nt, stage.flops_independent.exact)
        for stage in plan.stages
    ]
    iterations = sum(stage.iterations for stage in plan.stages)
    totals = ("family", None, None, None, None, None, iterations, None, plan.tokens, plan.tokens_independent)
    costs = (plan.flops.six_nt, plan.flops.exact, plan.flops_independent.six_nt, plan.flops_independent.exact)
    title = f"plan of {plan.name}"
    return Table(title=title, columns=columns, rows=tuple(rows), totals=totals + costs, footnotes=_plan_footnotes(plan))


def _plan_footnotes(plan: FamilyPlan) -> tuple[str, ...]:
    nominal = any(stage.nominal_parameters for stage in plan.stages)
    counted = {
        "6NT": "6 N a token" + (", N nominal where given" if nominal else ""),
        "exact": "matrices and the causal half of attention, per layer",
    }
    savings = f"{human(plan.saving('6NT'), 'share')} by 6NT, {human(plan.saving('exact'), 'share')} by exact FLOPs"
    return (
        f"The family saves {savings}, against training every model alone.",
        "Alone: the same model with all the FLOPs that the family has spent when this model is finished.",
        f"FLOPs shown: {counted[plan.rule]}; recomputed activations are not counted. Steps are rounded down.",
    )


def family_table(result: FamilyResult) -> Table:
    """What each stage did: tokens, cost, and the validation loss around growth and at the end."""
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
        Column("loss_before_growth", "loss at\nparent", "loss"),
        Column("loss_after_growth", "after\ngrowth", "loss"),
        Column("change_by_growth", "change", "difference"),
        Column("loss_at_end", "at the\nend", "loss"),
    )
    rows: list[tuple[Value, ...]] = [
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
    losses = "Validation losses in nats per token, always on the same samples; FLOPs as training recorded them."
    if any(stage.state == "training" for stage in result.stages):
        losses += " The last one of a stage in training is its latest."
    spent = result.spent
    if len(spent.stages) < 2:
        return (losses, "The family starts to save with its second model.")
    whose = "Saved" if result.finished else f"Saved by the {len(spent.stages)} finished models"
    return (
        losses,
        f"{whose}: {human(spent.saving('6NT'), 'share')} of training FLOPs by 6NT, "
        f"{human(spent.saving('exact'), 'share')} by exact FLOPs, against training each of them alone "
        "with all that the family has spent on it and its ancestors.",
    )


def as_json(table: Table) -> str:
    """The table for programs: every column, raw values, keys by column; totals and footnotes beside."""
    keys = [column.key for column in table.columns]

    def named(row: tuple[Value, ...]) -> dict[str, Value]:
        return dict(zip(keys, row, strict=True))

    content = {
        "title": table.title,
        "rows": [named(row) for row in table.rows],
        "totals": named(table.totals) if table.totals else None,
        "footnotes": list(table.footnotes),
    }
    return json.dumps(content, indent=2, allow_nan=False)


def cells(table: Table, row: tuple[Value, ...]) -> list[str]:
    """The texts of a row for people, shown columns only."""
    pairs = zip(table.columns, row, strict=True)
    return [human(value, column.unit) for column, value in pairs if column.shown]


def render_table(table: Table) -> "Group":
    """The table for a terminal: `rich.console.Console().print(render_table(table))`; fits 110 characters."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_footer=table.totals is not None,
        footer_style="bold",
    )
    totals = cells(table, table.totals) if table.totals else [""] * len(table.columns)
    shown = [column for column in table.columns if column.shown]
    for column, total in zip(shown, totals, strict=False):
        text = column.unit == "text"
        drawn.add_column(
            Text(column.heading),
            footer=Text("" if total == _MISSING else total),
            justify="left" if text else "right",
            no_wrap=not text,
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*(Text(text) for text in cells(table, row)))
    return Group(drawn, *(Text(note, style="dim") for note in table.footnotes))


_MISSING = "–"
_SIZES = (("", 1.0), (" k", 1e3), (" M", 1e6), (" B", 1e9), (" T", 1e12))


def human(value: Value, unit: Unit) -> str:
    """A value for people: 20 B, 1.20e20, 8.00e-4, 24.7 %, 5.2 h; a dash for what is not known."""
    if value is None:
        return _MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    if unit == "count":
        return _count(value)
    if unit == "bytes":
        return _count(value).replace("B", "G") + "B" if value >= 1000 else f"{value:.0f} B"
    if unit == "seconds":
        return _seconds(value)
    if unit in ("flops", "rate"):
        return _power(value, ".2e")
    if unit == "difference":
        return _power(value, "+.1e") if abs(value) < 5e-5 else f"{value:+.4f}"
    formats = {"integer": ",.0f", "loss": ".4f"}
    return f"{100 * value:.1f} %" if unit == "share" else format(value, formats.get(unit, "g"))


def _power(value: float, digits: str) -> str:
    """A power of ten without its padding: 1.20e20, 8.00e-4."""
    mantissa, exponent = format(value, digits).split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _count(value: float) -> str:
    """Three digits and a size: 997 M, 2.00 B, but 2 B where that is exact; never 1000 M, as rounding comes first."""
    rounded = float(f"{value:.3g}")
    suffix, size = max((pair for pair in _SIZES if pair[1] <= max(abs(rounded), 1.0)), key=lambda pair: pair[1])
    digits = f"{rounded / size:.3g}" if rounded == value else f"{rounded / size:#.3g}".rstrip(".")
    return digits + suffix


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
