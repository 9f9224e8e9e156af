"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

FamilyFile = Annotated[Path, typer.Argument(metavar="FAMILY", help="a family.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted overrides: stages.1.schedule.max_lr=3e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the same as JSON")]
StageName = Annotated[str, typer.Option("--stage", metavar="NAME", help="a stage, by its name or number")]
