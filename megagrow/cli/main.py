"""`megagrow VERB`: parse, hand over to the verb's module, and turn a user's error into one line and exit code 2.

Nothing heavy is imported here: `megagrow --help` answers before torch could have been found.
"""

import atexit
import gc
import os
import sys
import warnings

import typer

from megagrow import log
from megagrow.cli.checkpoint.commands import convert, diff, inspect, operators, verify
from megagrow.cli.family.commands import cancel, data, job_, launch, logs, plan, report, run, status, train
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

for _verb in (plan, run, data, train, convert, verify, inspect, diff, operators, report, launch, status, cancel, logs):
    app.command()(_verb)
app.command("job", hidden=True)(job_)


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
