"""`megagrow VERB`: parse, hand over to the verb's module, and turn a user's error into one line and exit code 2.

Nothing heavy is imported here: `megagrow --help` answers before torch could have been found.
"""

import os
import sys
import warnings
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
    family: FamilyFile,
    stage: StageName,
    overrides: Overrides = None,
    source: Annotated[
        Path | None, typer.Option(help="checkpoint to start from; default: the last one of the stage before")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="where to write; default: the stage's own checkpoints")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes; the result is the same for any number")] = 1,
    json: AsJson = False,
) -> None:
    """Grow and reshard a checkpoint into a stage's shape and layout. Needs no GPU, no model, no ranks.

    Example: megagrow convert examples/demo/family.yaml --stage medium
    """
    from megagrow.cli.checkpoints import convert_checkpoint

    convert_checkpoint(family, overrides or [], stage, source, save, workers, json)


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
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="an iteration directory")],
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    json: AsJson = False,
) -> None:
    """Say what a checkpoint is: shape, layout, position, ancestry, what is new, tensors.

    Example: megagrow inspect runs/demo/medium/checkpoints/iter_0000000 --tensors
    """
    from megagrow.cli.checkpoints import inspect_checkpoint

    inspect_checkpoint(checkpoint, tensors, json)


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


def main() -> None:
    """Entry point: a UserError is one line on standard error (from rank 0) and its exit code."""
    log.setup()
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
