"""Command-line interface of the verbs on a family; each imports its implementation when it is called."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.arguments import AsJson, FamilyFile, Overrides, StageName, user_path

JobNames = Annotated[
    list[str] | None, typer.Option("--job", metavar="JOB", help="name of a job; may be repeated; default: all jobs")
]


def plan(
    family: Annotated[
        Path | None, typer.Argument(metavar="FAMILY", help="path of a family.yaml", callback=user_path)
    ] = None,
    overrides: Overrides = None,
    from_megatron: Annotated[
        Path | None,
        typer.Option(
            metavar="SCRIPT|CHECKPOINT",
            help="print a family.yaml of a run of Megatron-LM instead: from its shell script, or from a checkpoint",
            callback=user_path,
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show the plan of a family: parameters, tokens, FLOPs, learning rates, and what it saves.

    With --from-megatron, read the flags of pretrain_gpt.py from a script, which is not run, or from a checkpoint, and
    print a family.yaml of that run, with what it does not carry as comments. NAME=VALUE adds an argument.

    Example: megagrow plan examples/llama_1b_to_8b/family.yaml

    Example: megagrow plan --from-megatron train.sh vocab_size=50257 > family.yaml
    """
    from megagrow.cli.family.overview import show_plan

    if from_megatron is not None:
        from megagrow.cli.family.from_megatron import show_family

        show_family(from_megatron, [*([] if family is None else [str(family)]), *(overrides or [])])
        return
    if family is None:
        raise typer.BadParameter("give a FAMILY, or --from-megatron with a script or a checkpoint")
    show_plan(family, overrides or [], json)


def run(family: FamilyFile, overrides: Overrides = None) -> None:
    """Build the whole family on this machine. If it is stopped or killed, the same command resumes it.

    Example: megagrow run examples/demo/family.yaml
    """
    from megagrow.cli.family.overview import run_family

    raise typer.Exit(run_family(family, overrides or []))


def data(family: FamilyFile, overrides: Overrides = None) -> None:
    """Prepare the tokenizer and the tokens of a family. Data that is already prepared is kept.

    Example: megagrow data examples/demo/family.yaml
    """
    from megagrow.cli.family.training import prepare_data

    prepare_data(family, overrides or [])


def train(family: FamilyFile, stage: StageName, overrides: Overrides = None) -> None:
    """Train one stage, or resume it from its newest checkpoint. Use torchrun if its layout has more than one rank.

    Example: torchrun --nproc-per-node 2 -m megagrow train examples/demo/family.yaml --stage medium
    """
    from megagrow.cli.family.training import train_stage

    train_stage(family, overrides or [], stage)


def report(family: FamilyFile, overrides: Overrides = None, json: AsJson = False) -> None:
    """Show the results of a family so far, and write report.html with its loss curves.

    Example: megagrow report examples/demo/family.yaml
    """
    from megagrow.cli.family.overview import show_report

    show_report(family, overrides or [], json)


def launch(
    family: FamilyFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the sbatch scripts and submit nothing")] = False,
    scripts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="with --dry-run: write the scripts to this directory", callback=user_path),
    ] = None,
) -> None:
    """Submit a family's jobs to Slurm, each to run after the jobs it needs.

    Finished jobs are skipped and queued jobs stay as they are, so the command can be repeated at any time.

    Example: megagrow launch examples/llama_1b_to_8b/family.yaml --dry-run
    """
    from megagrow.cli.family.cluster import launch_family

    launch_family(family, overrides or [], dry_run, scripts)


def status(
    family: FamilyFile,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="update the table until all jobs are finished")] = False,
    interval: Annotated[float, typer.Option(min=0.5, help="seconds between updates of --watch")] = 5.0,
    json: AsJson = False,
) -> None:
    """Show the state of a family's jobs: progress, tokens/s, expected end, last checkpoint, why a job waits or failed.

    Example: megagrow status examples/demo/family.yaml --watch
    """
    from megagrow.cli.family.cluster import show_status

    show_status(family, overrides or [], interval if watch else None, json)


def cancel(family: FamilyFile, overrides: Overrides = None, job: JobNames = None) -> None:
    """Cancel a family's jobs on the cluster, by default all of them. A running training saves a checkpoint first.

    Example: megagrow cancel examples/llama_1b_to_8b/family.yaml --job train-1b
    """
    from megagrow.cli.family.cluster import cancel_jobs

    cancel_jobs(family, overrides or [], job or [])


def logs(
    family: FamilyFile,
    job: Annotated[str, typer.Argument(metavar="JOB", help="name of a job, as shown by megagrow status")],
    overrides: Overrides = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="number of lines to print, from the end")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing new lines")] = False,
) -> None:
    """Print the end of the newest log of a job on the cluster.

    Example: megagrow logs examples/llama_1b_to_8b/family.yaml train-1b --follow
    """
    from megagrow.cli.family.cluster import show_log

    show_log(family, overrides or [], job, lines, follow)


def job_(
    family: FamilyFile,
    name: Annotated[str, typer.Option("--job", metavar="JOB", help="name of the job")],
    overrides: Overrides = None,
    begin: Annotated[bool, typer.Option("--begin", help="decide before the job starts")] = False,
    ended: Annotated[
        int | None, typer.Option(metavar="CODE", help="decide after the job ended with this exit code")
    ] = None,
) -> None:
    """Print what a job's script does next, as one word: work, finished, again or failed. Called by the scripts."""
    if begin == (ended is not None):
        raise typer.BadParameter("give either --begin or --ended CODE")
    from megagrow.cli.family.cluster import answer_script

    answer_script(family, overrides or [], name, ended)
