"""Arguments and options shared by several verbs."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.errors import ConfigError


def user_path(value: Path | None) -> Path | None:
    """Return a path of the command line with `~` expanded, as in --source=~/x; ConfigError if it has a `$`."""
    if value is None or not (str(value).startswith("~") or "$" in str(value)):
        return value
    from megagrow.config.user_paths import expand_path

    try:
        expanded: Path | None = expand_path(value)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return expanded


FamilyFile = Annotated[Path, typer.Argument(metavar="FAMILY", help="path of a family.yaml", callback=user_path)]
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
        help="an unknown argument, or key of config.json, that does not change the model; may be given several times",
    ),
]
Sha256 = Annotated[
    bool, typer.Option("--sha256", help="write sha256 checksums, as newer Megatron does; slower than xxh3_128")
]
SkipChecksums = Annotated[
    bool, typer.Option("--skip-checksums", help="do not compare the source with its checksums; the result says so")
]
AllowNonFinite = Annotated[
    bool, typer.Option("--allow-non-finite", help="carry NaN and infinite values over instead of refusing them")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only print what would be read and written, memory and time")]
