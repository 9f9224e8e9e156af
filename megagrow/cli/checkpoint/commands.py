"""The verbs on checkpoints, as the command line has them: each hands over to its module, which it imports only then."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.arguments import AsJson, Overrides


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
    from megagrow.convert.early import Warmup

    with Warmup(1 if dry_run else workers) as warmup:
        if not dry_run:
            warmup.begin(source_or_family)
        from megagrow.cli.checkpoint.convert import Options, convert

        convert(
            source_or_family,
            rest or [],
            stage=stage,
            source=source,
            save=save,
            to=to,
            tokenizer=tokenizer,
            options=Options(workers, memory, overwrite, restart, sha256, optimizer, dry_run, json, warmup),
        )


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
    from megagrow.cli.checkpoint.verify import verify_checkpoint

    raise typer.Exit(verify_checkpoint(path, overrides or [], stage, parent, json, deep=deep))


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
    from megagrow.cli.checkpoint.inspect import inspect_checkpoint

    inspect_checkpoint(checkpoint, tensors, json)


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint, in any format")],
    other: Annotated[Path, typer.Argument(metavar="B", help="another, in any format")],
    every: Annotated[bool, typer.Option("--all", help="list equal tensors too")] = False,
    json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever their formats and layouts. Exit code 1: they differ.

    Example: megagrow diff runs/a/iter_0000100 runs/b/iter_0000100
    """
    from megagrow.cli.checkpoint.inspect import diff_checkpoints

    raise typer.Exit(diff_checkpoints(one, other, every, json))


def operators(json: AsJson = False) -> None:
    """List the growth operators: axis, exactness, what they do, where they come from.

    Example: megagrow operators
    """
    from megagrow.cli.checkpoint.operators import show_operators

    show_operators(json)
