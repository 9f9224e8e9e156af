"""The verbs plan, run and report, which need no torch."""

from pathlib import Path

from megagrow import extras
from megagrow.cli.family.training import show_repeated_sources
from megagrow.cli.output import announce, show
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.errors import CheckpointError, ConfigError


def show_plan(file: Path, overrides: list[str], as_json: bool) -> None:
    """Print the plan of a family."""
    from megagrow.plan import family_plan
    from megagrow.report.tables import plan_table

    family = load(file, overrides)
    check_growth(family)
    show(plan_table(family_plan(family)), json=as_json)
    show_repeated_sources(family)


def run_family(file: Path, overrides: list[str]) -> int:
    """Run a family's jobs on this machine; return the exit code."""
    from megagrow.launch import local
    from megagrow.launch.graph import family_jobs

    family = load(file, overrides)
    check_growth(family)
    check_export(family)
    return local.run_family(family, family_jobs(family, file, tuple(overrides)), announce)


def show_report(file: Path, overrides: list[str], as_json: bool) -> None:
    """Print the results of a family and write its report page."""
    from megagrow.report.page import missing_curves, write_report
    from megagrow.report.tables import family_table

    family = load(file, overrides)
    path = FamilyPaths(family).report
    result = write_report(family, path)
    show(family_table(result), json=as_json)
    if not as_json:
        print(f"report: {path}")
        if reason := missing_curves(result):
            announce(reason)


def check_growth(family: Family) -> None:
    """Reject a family with an impossible growth step before any of its jobs runs."""
    from megagrow.growth.operators import plan_growth

    for small, large in zip(family.stages, family.stages[1:], strict=False):
        plan_growth(small.model, large.model, large.growth, family.seed)


def check_export(family: Family) -> None:
    """Reject a stage that cannot be exported, before it is trained; without torch only the export job can check it."""
    if not extras.is_installed("torch") or not any(stage.export for stage in family.stages):
        return
    from megagrow.checkpoint.formats.huggingface import choose_architecture

    for index, stage in enumerate(family.stages):
        if stage.export is not None:
            try:
                choose_architecture(stage.model)
            except CheckpointError as error:
                raise ConfigError(f"stages.{index}.export: {stage.export}: {error}") from None
