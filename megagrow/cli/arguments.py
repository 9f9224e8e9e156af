"""Arguments and options shared by several verbs."""

from pathlib import Path
from typing import Annotated

import typer

FamilyFile = Annotated[Path, typer.Argument(metavar="FAMILY", help="path of a family.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override settings: stages.1.schedule.max_lr=3e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
StageName = Annotated[str, typer.Option("--stage", metavar="NAME", help="name or number (from 0) of a stage")]
IgnoredArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-argument",
        metavar="NAME",
        help="a saved argument unknown to Megatron-LM that does not change the model; may be given several times",
    ),
]
