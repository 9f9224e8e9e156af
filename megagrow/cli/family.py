"""Verbs on a whole family that need no torch: plan, run, report."""

import sys
from pathlib import Path

from rich.console import Console

from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths


def show_plan(file: Path, overrides: list[str], as_json: bool) -> None:
    """Print the plan of a family."""
    from megagrow.plan import family_plan
    from megagrow.report import tables

    family = load(file, overrides)
    check_growth(family)
    _print(tables.plan_table(family_plan(family)), as_json)


def run_family(file: Path, overrides: list[str]) -> int:
    """Run a family's jobs on this machine; return the exit code."""
    from megagrow.launch.graph import family_jobs
    from megagrow.launch.local import run_family as run

    family = load(file, overrides)
    check_growth(family)
    return run(
        family, family_jobs(family, file, tuple(overrides)), lambda line: print(line, file=sys.stderr, flush=True)
    )


def show_report(file: Path, overrides: list[str], as_json: bool) -> None:
    """Print how a family went and write its page."""
    from megagrow.report import tables
    from megagrow.report.page import write_report

    family = load(file, overrides)
    path = FamilyPaths(family).report
    result = write_report(family, path)
    _print(tables.family_table(result), as_json)
    if not as_json:
        print(f"report: {path}")


def check_growth(family: Family) -> None:
    """Refuse a family with an impossible growth step before anything of it runs."""
    from megagrow.growth.step import plan_growth

    for small, large in zip(family.stages, family.stages[1:], strict=False):
        plan_growth(small.model, large.model, large.growth, family.seed)


def _print(table: object, as_json: bool) -> None:
    from megagrow.report import tables

    if as_json:
        print(tables.as_json(table))  # type: ignore[arg-type]
    else:
        Console().print(tables.render_table(table))  # type: ignore[arg-type]
