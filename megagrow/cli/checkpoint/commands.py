"""Command-line interface of the verbs on checkpoints; each imports its implementation when it is called."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.arguments import (
    AllowNonFinite,
    AsJson,
    DryRun,
    IgnoredArguments,
    Overrides,
    Sha256,
    SkipChecksums,
    user_path,
)

SourceOption = Annotated[
    Path | None,
    typer.Option(
        help="with a FAMILY: checkpoint to convert; default: newest of the previous stage (with --to: of the stage)",
        callback=user_path,
    ),
]
TargetAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TARGET] [KEY=VALUE]...", help="with a SOURCE: directory to write to; then values to override"
    ),
]
StageOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="with a FAMILY: stage to grow into, or with --to the stage to export")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(help="with --to huggingface: tokenizer to copy next to the model", callback=user_path),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(help="with a FAMILY: directory to write to; default: the stage's own", callback=user_path),
]

Format = Annotated[str, typer.Option(metavar="FORMAT", help="format to write: torch_dist, huggingface or legacy")]
Memory = Annotated[str, typer.Option(help="limit for all workers on this machine together")]
ScheduleOption = Annotated[
    str,
    typer.Option(
        metavar="fresh|continue",
        help="with a SOURCE that grows: begin a schedule at iteration 0, moments kept, or keep the source's place",
    ),
]


def convert(
    source_or_family: Annotated[
        Path,
        typer.Argument(
            metavar="FAMILY|SOURCE", help="path of a family.yaml, or of a checkpoint directory", callback=user_path
        ),
    ],
    rest: TargetAndOverrides = None,
    stage: StageOption = None,
    source: SourceOption = None,
    save: SaveOption = None,
    to: Format = "torch_dist",
    tokenizer: TokenizerOption = None,
    optimizer: Annotated[bool, typer.Option(help="also convert Adam's state")] = True,
    workers: Annotated[int, typer.Option(min=1, help="number of processes; does not change the result")] = 1,
    memory: Memory = "1GiB",
    sha256: Sha256 = False,
    overwrite: Annotated[bool, typer.Option(help="replace an existing target, after the new one is complete")] = False,
    restart: Annotated[bool, typer.Option(help="discard the files of an interrupted conversion")] = False,
    unchecked: SkipChecksums = False,
    non_finite: AllowNonFinite = False,
    schedule: ScheduleOption = "fresh",
    dry_run: DryRun = False,
    ignore_argument: IgnoredArguments = None,
    json: AsJson = False,
) -> None:
    """Grow and reshard a checkpoint of any format, without a GPU, a model or a process group.

    With a FAMILY, grow the previous stage into the shape and layout of --stage; with --to huggingface or legacy, export
    that stage. With SOURCE and TARGET directories, keep the source's settings except those overridden (model.*,
    parallel.*, growth.*, precision, seed). If a conversion is killed, the same command resumes it. Under torchrun or
    srun all ranks share the work.

    These examples work after `make demo`.

    Example: megagrow convert examples/demo/family.yaml --stage medium --save runs/regrown

    Example: megagrow convert examples/demo/family.yaml --stage large --to huggingface

    Example: megagrow convert runs/demo/large/checkpoints runs/deeper model.num_layers=8

    Example: megagrow convert runs/demo/large/checkpoints runs/deeper-hf model.num_layers=8 --to huggingface
    """
    from megagrow.convert.early import Warmup

    with Warmup(1 if dry_run else workers) as warmup:
        if not dry_run:
            warmup.begin(source_or_family)
        from megagrow.cli.checkpoint.conversion_options import Options
        from megagrow.cli.checkpoint.convert import convert

        options = Options(
            workers,
            memory,
            overwrite,
            restart,
            sha256,
            optimizer,
            dry_run,
            json,
            warmup,
            tuple(ignore_argument or ()),
            unchecked,
            non_finite,
            schedule,
        )
        convert(
            source_or_family,
            rest or [],
            stage=stage,
            source=source,
            save=save,
            to=to,
            tokenizer=tokenizer,
            options=options,
        )


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|FAMILY",
            help="a checkpoint's iteration directory, or a family.yaml",
            callback=user_path,
        ),
    ],
    overrides: Overrides = None,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="with a FAMILY: stage whose newest checkpoint is verified")
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(help="the checkpoint that it must have been grown from", callback=user_path)
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="also run it and its parent on the same tokens, and compare")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="with --deep: a text to compare on; default: random tokens", callback=user_path)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="with --text: its tokenizer, if none lies beside the models", callback=user_path)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="with --deep: prefix of a .bin/.idx pair to compare on", callback=user_path)
    ] = None,
    json: AsJson = False,
) -> None:
    """Verify a checkpoint: checksums, every tensor exactly once, shapes, finite values, no foreign objects.

    A checkpoint of any other format is checked as far as it can be, and what is left is listed.

    With --deep, a grown checkpoint that has not been trained yet also runs under Megatron-Core next to its parent, in
    this process. The two are compared by logits, loss, residual stream, non-zero gradients, similarity of copies and
    the dual rule.

    Exit code 2: a check failed, or the growth should be exact and is not.

    These examples work after `make demo`; the second also needs the first example of `megagrow convert --help`.

    Example: megagrow verify examples/demo/family.yaml --stage large

    Example: megagrow verify --deep runs/regrown/iter_0000000
    """
    from megagrow.cli.checkpoint.verify import verify_checkpoint
    from megagrow.errors import LaunchError

    if not deep and (text or tokenizer or data):
        raise LaunchError("--text, --tokenizer and --data are for --deep")
    tokens = None
    if deep:
        from megagrow.evaluate.named_tokens import NamedTokens

        tokens = NamedTokens(text, tokenizer, data)
    raise typer.Exit(verify_checkpoint(path, overrides or [], stage, parent, json, tokens))


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="an iteration directory, or a directory with iterations; any format",
            callback=user_path,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="also print all tensors, as a tree")] = False,
    ignore_argument: IgnoredArguments = None,
    json: AsJson = False,
) -> None:
    """Describe a checkpoint: format, shape, layout, moments, position, ancestors, new layers and widths, tensors.

    This example works after `make demo`; it describes the stage's newest checkpoint.

    Example: megagrow inspect runs/demo/medium/checkpoints --tensors
    """
    from megagrow.cli.checkpoint.inspect import inspect_checkpoint

    inspect_checkpoint(checkpoint, tensors, json, tuple(ignore_argument or ()))


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint in any format", callback=user_path)],
    other: Annotated[Path, typer.Argument(metavar="B", help="another checkpoint in any format", callback=user_path)],
    every: Annotated[bool, typer.Option("--all", help="also list equal tensors")] = False,
    ignore_argument: IgnoredArguments = None,
    json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor; their formats and layouts may differ. Exit code 1: a tensor differs.

    This example works after `make demo`.

    Example: megagrow diff runs/demo/large/checkpoints/iter_0000450 runs/demo/large/checkpoints/iter_0000470
    """
    from megagrow.cli.checkpoint.inspect import diff_checkpoints

    raise typer.Exit(diff_checkpoints(one, other, every, json, tuple(ignore_argument or ())))


def operators(json: AsJson = False) -> None:
    """List the growth operators: axes, exactness, and the paper each comes from; with --json also what each does.

    Example: megagrow operators
    """
    from megagrow.cli.checkpoint.operators import show_operators

    show_operators(json)
