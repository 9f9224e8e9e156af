"""`megagrow VERB`: parse, hand over to the verb's module, and turn a user's error into one line and exit code 2.

Nothing heavy is imported here: `megagrow --help` answers before torch could have been found.
"""

import atexit
import gc
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from megagrow import log
from megagrow.errors import UserError

app = typer.Typer(
    name="megagrow",
    help="Build a family of language models for about the price of its largest: train small, grow, train on.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FamilyFile = Annotated[Path, typer.Argument(metavar="FAMILY", help="a family.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted overrides: stages.1.schedule.max_lr=3e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the same as JSON")]
StageName = Annotated[str, typer.Option("--stage", metavar="NAME", help="a stage, by its name or number")]


@app.command()
def plan(family: FamilyFile, overrides: Overrides = None, json: AsJson = False) -> None:
    """Show what a family will cost: parameters, tokens, FLOPs, learning rates, saving.

    Example: megagrow plan examples/llama_1b_to_8b/family.yaml
    """
    from megagrow.cli.family import show_plan

    show_plan(family, overrides or [], json)


@app.command()
def run(family: FamilyFile, overrides: Overrides = None) -> None:
    """Build the whole family on this machine; after a kill, the same command goes on.

    Example: megagrow run examples/demo/family.yaml
    """
    from megagrow.cli.family import run_family

    raise typer.Exit(run_family(family, overrides or []))


@app.command()
def data(family: FamilyFile, overrides: Overrides = None) -> None:
    """Make the tokenizer and the tokens of a family; what is made stays.

    Example: megagrow data examples/demo/family.yaml
    """
    from megagrow.cli.training import prepare_data

    prepare_data(family, overrides or [])


@app.command()
def train(family: FamilyFile, stage: StageName, overrides: Overrides = None) -> None:
    """Train one stage, from where it stands. With more than one rank, start it with torchrun.

    Example: torchrun --nproc-per-node 2 -m megagrow train examples/demo/family.yaml --stage small
    """
    from megagrow.cli.training import train_stage

    train_stage(family, overrides or [], stage)


@app.command()
def convert(
    source_or_family: Annotated[
        Path, typer.Argument(metavar="FAMILY|SOURCE", help="a family.yaml, or the directory of a checkpoint")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TARGET] [KEY=VALUE]...", help="after a SOURCE where to write; then dotted overrides"),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="with a FAMILY: the stage to grow into; with --to, to export")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="with a FAMILY: start from this one, not the last of the stage before")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="with a FAMILY: where to write; default: a place of the stage's")
    ] = None,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="torch_dist, huggingface or legacy")] = "torch_dist",
    tokenizer: Annotated[Path | None, typer.Option(help="with --to huggingface: a tokenizer to put beside")] = None,
    optimizer: Annotated[bool, typer.Option(help="take Adam's state along")] = True,
    workers: Annotated[int, typer.Option(min=1, help="processes; the result is the same for any number")] = 1,
    memory: Annotated[str, typer.Option(help="bound on all workers of this machine together")] = "1GiB",
    sha256: Annotated[
        bool, typer.Option("--sha256", help="checksums by sha256, as newer Megatron has them, not by xxh3_128 (faster)")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace a target that is there, once the new one is whole")] = False,
    restart: Annotated[bool, typer.Option(help="throw away what an interrupted conversion has written")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be read, written and taken")] = False,
    json: AsJson = False,
) -> None:
    """Grow and reshard a checkpoint of any format. Needs no GPU, no model, no process group.

    By a family: into its stage's shape and layout; with --to, out of the stage. From directory to directory: the
    source's shape, but for what is said (model.*, parallel.*, growth.*, precision, seed). A killed conversion goes on
    where it stopped. Under torchrun or srun all ranks share the work.

    Example: megagrow convert examples/demo/family.yaml --stage medium

    Example: megagrow convert runs/a/iter_0000100 runs/b parallel.tensor_model_parallel_size=2 model.num_layers=24
    """
    from megagrow.cli.early import early

    with nullcontext((None, None)) if dry_run else early(source_or_family, workers) as (crew, ahead):
        from megagrow.cli.convert import Options, convert

        convert(
            source_or_family,
            rest or [],
            stage=stage,
            source=source,
            save=save,
            to=to,
            tokenizer=tokenizer,
            options=Options(workers, memory, overwrite, restart, sha256, optimizer, dry_run, json, crew, ahead),
        )


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT|FAMILY", help="an iteration directory or a family.yaml")],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="with a FAMILY: its stage's newest checkpoint")] = None,
    parent: Annotated[Path | None, typer.Option(help="checkpoint that it must descend from")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="also run both on the same tokens: is the function the parent's?")
    ] = False,
    json: AsJson = False,
) -> None:
    """Prove a checkpoint whole: checksums, every tensor once, shapes, finite values, nothing foreign.

    With --deep a grown checkpoint and its parent also run under Megatron-Core, in this process: logits, loss,
    residual stream, live gradients, likeness of copies, the dual rule. Exit code 2 where exactness was promised and
    is not there.

    Example: megagrow verify --deep runs/demo/medium/checkpoints/iter_0000000
    """
    from megagrow.cli.checkpoints import verify_checkpoint

    raise typer.Exit(verify_checkpoint(path, overrides or [], stage, parent, json, deep=deep))


@app.command()
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="its directory, or that of its iterations; any format")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="the tree of all tensors")] = False,
    json: AsJson = False,
) -> None:
    """Say what a checkpoint is: format, shape, layout, moments, position, ancestry, what is new, tensors.

    Example: megagrow inspect runs/demo/medium/checkpoints/iter_0000000 --tensors
    """
    from megagrow.cli.inspect import inspect_checkpoint

    inspect_checkpoint(checkpoint, tensors, json)


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint, in any format")],
    other: Annotated[Path, typer.Argument(metavar="B", help="another, in any format")],
    every: Annotated[bool, typer.Option("--all", help="list equal tensors too")] = False,
    json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever their formats and layouts. Exit code 1: they differ.

    Example: megagrow diff runs/a/iter_0000100 runs/b/iter_0000100
    """
    from megagrow.cli.inspect import diff_checkpoints

    raise typer.Exit(diff_checkpoints(one, other, every, json))


@app.command()
def operators(json: AsJson = False) -> None:
    """List the growth operators: axis, exactness, what they do, where they come from.

    Example: megagrow operators
    """
    from megagrow.cli.operators import show_operators

    show_operators(json)


@app.command()
def report(family: FamilyFile, overrides: Overrides = None, json: AsJson = False) -> None:
    """Show how a family went, and write report.html with its curves.

    Example: megagrow report examples/demo/family.yaml
    """
    from megagrow.cli.family import show_report

    show_report(family, overrides or [], json)


@app.command()
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
    from megagrow.cli.cluster import launch_family

    launch_family(family, overrides or [], dry_run, scripts)


@app.command()
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
    from megagrow.cli.cluster import show_status

    show_status(family, overrides or [], interval if watch else None, json)


JobNames = Annotated[list[str] | None, typer.Option("--job", metavar="JOB", help="a job by its name; default: all")]


@app.command()
def cancel(family: FamilyFile, overrides: Overrides = None, job: JobNames = None) -> None:
    """Take a family's jobs, or those named, from Slurm's queue; ranks that train save first.

    Example: megagrow cancel family.yaml --job train-350m
    """
    from megagrow.cli.cluster import cancel_jobs

    cancel_jobs(family, overrides or [], job or [])


@app.command()
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
    from megagrow.cli.cluster import show_log

    show_log(family, overrides or [], job, lines, follow)


@app.command("job", hidden=True)
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
    from megagrow.cli.cluster import answer_script

    answer_script(family, overrides or [], name, ended)


def main() -> None:
    """Entry point: a UserError is one line on standard error (from rank 0) and its exit code."""
    log.setup()
    # else Python ends with a search for garbage among all that torch has made: a fifth of the time of a short command
    atexit.register(gc.freeze)
    # Megatron-Core 0.16.1 warns at every import that Transformer Engine is missing, and at every save that it uses
    # names which torch 2.13 deprecates: nothing that a user could mend
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megagrow: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
