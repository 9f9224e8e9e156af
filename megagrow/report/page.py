"""Writes the report of a family as one self-contained HTML file.

The page is a template filled with a few values. Its curves are inline SVG, its style is in the page and it has no
scripts, so the file can be mailed, archived and opened offline. It is replaced atomically, so a reader who reloads it
while the family trains always gets a complete page.
"""

import datetime
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import megagrow
from megagrow import extras
from megagrow.config import Family
from megagrow.config.file_names import CHECKPOINTS
from megagrow.errors import UserError
from megagrow.files.atomic import write_atomically
from megagrow.records import ConversionRecord
from megagrow.report import figures
from megagrow.report.collect import FamilyResult, collect
from megagrow.report.tables import Column, Table, cells, exactness_text, family_table, human, operators_text, plan_table


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of the cost comparison: a part for each stage, as a share of the longest bar's length."""

    label: str
    total: str
    parts: tuple[tuple[str, float], ...]


def write_report(family: Family, path: Path) -> FamilyResult:
    """Write report.html for a family in any state; return its results. UserError if it cannot be written."""
    result = collect(family)
    text = render_page(result)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written: {error.strerror}") from None
    return result


def render_page(result: FamilyResult) -> str:
    """The HTML text of the page."""
    import jinja2
    from markupsafe import Markup

    source = resources.files("megagrow.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals.update(cells=cells, human=human)
    curves = []
    if figures.has_curves(result) and missing_curves(result) is None:
        curves = [Markup(figures.loss_curves(result, "flops")), Markup(figures.loss_curves(result, "tokens"))]
    return environment.from_string(source).render(
        result=result,
        headline=_headline(result),
        family_table=family_table(result),
        plan_table=plan_table(result.plan),
        growth_table=_growth_table(result.conversions),
        bars=_bars(result),
        curves=curves,
        no_curves=None if curves else missing_curves(result) or "No losses yet: nothing has been trained.",
        updated=_when(result.last_time),
        version=megagrow.__version__,
    )


def missing_curves(result: FamilyResult) -> str | None:
    """Why the page of a trained family has no loss curves, and what would bring them; None if it has them."""
    if not figures.has_curves(result) or extras.is_installed("matplotlib"):
        return None
    return f"The page has no loss curves, because matplotlib is not installed: {extras.how_to_install('matplotlib')}"


def _headline(result: FamilyResult) -> str:
    """The first line of the page: the number of models, their cost, and what the family saves."""
    rule, stages = result.plan.rule, result.plan.stages
    names = f"{len(stages)} models, {stages[0].name} to {stages[-1].name}" if len(stages) > 1 else "One model"
    if result.is_finished and len(stages) > 1:
        return (
            f"{names}, trained with {human(result.spent.flops.by(rule), 'flops')} training FLOPs ({rule}): "
            f"{human(result.spent.saving(), 'share')} less than training each model alone."
        )
    finished = sum(stage.state == "finished" for stage in result.stages)
    plan = f"Planned: {human(result.plan.flops.by(rule), 'flops')} training FLOPs ({rule})"
    if len(stages) > 1:
        plan += f", {human(result.plan.saving(), 'share')} less than training each model alone"
    return f"{names}, {finished} of {len(stages)} finished. {plan}."


def _bars(result: FamilyResult) -> tuple[Bar, ...]:
    """The cost of independent models and of the family: as planned, or as spent once two stages are finished."""
    plan = result.spent if len(result.spent.stages) > 1 else result.plan
    rule = plan.rule
    longest = plan.flops_independent.by(rule)
    alone = tuple((stage.name, stage.flops_independent.by(rule) / longest) for stage in plan.stages)
    family = tuple((stage.name, stage.flops.by(rule) / longest) for stage in plan.stages)
    return (
        Bar(label="each alone", total=human(longest, "flops"), parts=alone),
        Bar(label="as a family", total=human(plan.flops.by(rule), "flops"), parts=family),
    )


def _growth_table(conversions: tuple[ConversionRecord, ...]) -> Table:
    columns = (
        Column("step", "from → to"),
        Column("operators", "operators"),
        Column("moments", "moments"),
        Column("exact", "function"),
        Column("tensors", "tensors", "integer"),
        Column("bytes_written", "written", "bytes"),
        Column("seconds", "time", "seconds"),
    )
    rows = tuple(
        (
            f"{_checkpoint(record.source)} → {_checkpoint(record.target)}",
            operators_text(record.operators),
            record.moments,
            exactness_text(record.exact, record.storage),
            record.tensors,
            record.bytes_written,
            record.seconds,
        )
        for record in conversions
    )
    return Table(title="growth steps", columns=columns, rows=rows)


def _checkpoint(path: str) -> str:
    """The stage and the iteration in a checkpoint's path."""
    parts = [part for part in Path(path).parts if part != CHECKPOINTS]
    return "/".join(parts[-2:])


def _when(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
