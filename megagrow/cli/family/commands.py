"""The verbs on a family, as the command line has them: each hands over to its module, which it imports only then."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.arguments import AsJson, FamilyFile, Overrides, StageName

JobNames = Annotated[list[str] | None, typer.Option("--job", metavar="JOB", help="a job by its name; default: all")]


def plan(family: FamilyFile, overrides: Overrides = None, json: AsJson = False) -> None:
    """Show what a family will cost: parameters, tokens, FLOPs, learning rates, saving.

    Example: megagrow plan examples/llama_1b_to_8b/family.yaml
    """
    from megagrow.cli.family.overview import show_plan

    show_plan(family, overrides or [], json)


def run(family: FamilyFile, overrides: Overrides = None) -> None:
    """Build the whole family on this machine; after a kill, the same command goes on.

    Example: megagrow run examples/demo/family.yaml
    """
    from megagrow.cli.family.overview import run_family

    raise typer.Exit(run_family(family, overrides or []))


def data(family: FamilyFile, overrides: Overrides = None) -> None:
    """Make the tokenizer and the tokens of a family; what is made stays.

    Example: megagrow data examples/demo/family.yaml
    """
    from megagrow.cli.family.training import prepare_data

    prepare_data(family, overrides or [])


def train(family: FamilyFile, stage: StageName, overrides: Overrides = None) -> None:
    """Train one stage, from where it stands. With more than one rank, start it with torchrun.

    Example: torchrun --nproc-per-node 2 -m megagrow train examples/demo/family.yaml --stage small
    """
    from megagrow.cli.family.training import train_stage

    train_stage(family, overrides or [], stage)


def report(family: FamilyFile, overrides: Overrides = None, json: AsJson = False) -> None:
    """Show how a family went, and write report.html with its curves.

    Example: megagrow report examples/demo/family.yaml
    """
    from megagrow.cli.family.overview import show_report

    show_report(family, overrides or [], json)


def launch(
    family: FamilyFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the sbatch scripts, submit nothing")] = False,
    scripts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="with --dry-run: write the scripts here instead")
    ] = None,
) -> None:
    """Submit a family's jobs to Slurm, each behind what it needs; what is done or in the queue stays as it is.

    Example: megagrow launch examples/llama_1b_to_8b/family.yaml --dry-run
    """
    from megagrow.cli.family.cluster import launch_family

    launch_family(family, overrides or [], dry_run, scripts)


def status(
    family: FamilyFile,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="keep showing it, until all is done")] = False,
    interval: Annotated[float, typer.Option(min=0.5, help="seconds between two looks of --watch")] = 5.0,
    json: AsJson = False,
) -> None:
    """Show where a family's jobs stand: state, progress, tokens/s, expected end, last checkpoint, why one waits.

    Example: megagrow status family.yaml --watch
    """
    from megagrow.cli.family.cluster import show_status

    show_status(family, overrides or [], interval if watch else None, json)


def cancel(family: FamilyFile, overrides: Overrides = None, job: JobNames = None) -> None:
    """Take a family's jobs, or those named, from Slurm's queue; ranks that train save first.

    Example: megagrow cancel family.yaml --job train-350m
    """
    from megagrow.cli.family.cluster import cancel_jobs

    cancel_jobs(family, overrides or [], job or [])


def logs(
    family: FamilyFile,
    job: Annotated[str, typer.Argument(metavar="JOB", help="a job by its name, as status shows it")],
    overrides: Overrides = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="of its end")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on with what comes")] = False,
) -> None:
    """Print the end of a job's log on the cluster.

    Example: megagrow logs family.yaml train-350m --follow
    """
    from megagrow.cli.family.cluster import show_log

    show_log(family, overrides or [], job, lines, follow)


def job_(
    family: FamilyFile,
    name: Annotated[str, typer.Option("--job", metavar="JOB", help="a job by its name")],
    overrides: Overrides = None,
    begin: Annotated[bool, typer.Option("--begin", help="asked before the job's work")] = False,
    ended: Annotated[int | None, typer.Option(metavar="CODE", help="asked after it, with its exit code")] = None,
) -> None:
    """Tell a job's script what to do next, in one word: work, finished, again or failed."""
    if begin == (ended is not None):
        raise typer.BadParameter("say either --begin or --ended CODE")
    from megagrow.cli.family.cluster import answer_script

    answer_script(family, overrides or [], name, ended)
