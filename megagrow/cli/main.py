"""`megagrow VERB`: parses the command line, calls the verb, and turns errors of the user into one line and exit code 2.

Nothing heavy is imported here, so `megagrow --help` is fast.
"""

import atexit
import gc
import os
import sys
import warnings
from typing import NoReturn

import typer

from megagrow import extras, log
from megagrow.cli.checkpoint.commands import convert, diff, inspect, operators, verify
from megagrow.cli.family.commands import cancel, data, job_, launch, logs, plan, report, run, status, train
from megagrow.cli.output import show_error
from megagrow.errors import UserError

app = typer.Typer(
    name="megagrow",
    help="Build a family of language models for about the cost of its largest: train a small model, grow it, train on.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _verb in (plan, run, data, train, convert, verify, inspect, diff, operators, report, launch, status, cancel, logs):
    app.command()(_verb)
app.command("job", hidden=True)(job_)


def main() -> None:
    """Entry point. Rank 0 prints a UserError as one line on standard error; every rank exits with its code."""
    # without this Python's last garbage collection visits every object of torch: a fifth of the time of a short command
    atexit.register(gc.freeze)
    # Megatron-Core 0.16.1 warns at every import that Transformer Engine is missing, and at every save that it uses
    # names deprecated by torch 2.13; a user can fix neither
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    try:
        log.setup()
        app()
    except UserError as error:
        _exit_with(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in extras.INSTALL or extras.is_installed(package):
            raise
        _exit_with(extras.missing(package, f"megagrow {' '.join(sys.argv[1:2])}"))
    except OSError as error:
        if not isinstance(error.filename, str | bytes):  # not about a file that the user could name
            raise
        show_error(f"{os.fsdecode(error.filename)}: {error.strerror}")
        sys.exit(UserError.exit_code)


def _exit_with(error: UserError) -> NoReturn:
    """Print an error, on rank 0 alone because every rank has the same, and exit with its code."""
    rank = os.environ.get("RANK", "")
    if not rank.isdecimal() or int(rank) == 0:
        show_error(str(error))
    sys.exit(error.exit_code)
