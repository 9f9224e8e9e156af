"""The option --deep of the verb verify: find the parent and the tokens, compare, store the record, print it."""

from pathlib import Path
from typing import TYPE_CHECKING

from megagrow import records
from megagrow.cli.output import console, show, show_error, show_note
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import CheckpointError, DataError
from megagrow.records import DeepRecord

if TYPE_CHECKING:
    from megagrow.evaluate.live import TokenBatch
    from megagrow.evaluate.named_tokens import NamedTokens
    from megagrow.report.tables import Table

_RECORDS_FILE = "deep.jsonl"


def run_deep(child: Path, parent: Path | None, family: Family | None, tokens: "NamedTokens") -> DeepRecord | None:
    """Compare a checkpoint with its parent; append the record to the family's, or to a file next to it.

    None if memory does not suffice, which is printed.

    Raises:
        CheckpointError: the checkpoint has no parent, or the parent no longer exists.
        DataError: the tokens cannot be read.
    """
    from megagrow.checkpoint.formats import resolve_directory
    from megagrow.evaluate.deep import RANDOM, MemoryShort, verify_deep
    from megagrow.evaluate.named_tokens import named_batches

    parent = resolve_directory(parent or _parent_of(child))
    batches, words = named_batches(tokens, child, parent)
    if batches is None and family is not None and (batches := _validation_batches(family)) is not None:
        words = "the family's validation samples"
    try:
        record = verify_deep(parent, child, batches, tokens_from=words if batches is not None else RANDOM)
    except MemoryShort as error:
        show_note(f"{child}: --deep was {error}")
        return None
    records.append(FamilyPaths(family).records if family else child.resolve().parent / _RECORDS_FILE, record)
    return record


def show_deep(record: DeepRecord) -> None:
    """Print a record: tables, then the verdict."""
    from rich.text import Text

    tables = [_summary(record), _residual(record)]
    if record.copies:
        tables.append(_copies(record))
    if record.gradients:
        tables.append(_gradients(record))
    for table in tables:
        show(table)
        print()
    if record.verdict == "broken":
        show_error(f"{record.child}: {record.words}")
    else:
        console().print(Text(record.words))


def _parent_of(child: Path) -> Path:
    from megagrow.checkpoint.directory import MANIFEST, read_manifest

    lineage = read_manifest(child).lineage if (child / MANIFEST).is_file() else ()
    if not lineage:
        raise CheckpointError(f"{child}: was not grown, so --deep needs --parent, a checkpoint to compare it with")
    parent = Path(lineage[-1].path)
    if not parent.is_dir():
        raise CheckpointError(f"{child}: its parent {parent} no longer exists there; give its path with --parent")
    return parent


def _validation_batches(family: Family) -> "tuple[TokenBatch, ...] | None":
    """The family's validation samples; None if its data is not prepared on this machine."""
    from megagrow.data.record import read_prepared
    from megagrow.data.stream import validation_samples
    from megagrow.evaluate.deep import batches_of

    try:
        return batches_of(validation_samples(read_prepared(family), family))
    except DataError as error:
        show_note(f"{error}; random tokens are used instead")
        return None


def _summary(record: DeepRecord) -> "Table":
    from megagrow.report.tables import facts_table, operators_text

    rows = {
        "operators": operators_text(record.operators) or "none: resharded",
        "promised": "the parent's function" if record.promised else "nothing",
        "computed in": f"{record.precision}, with {record.weights} weights",
        "on": f"{record.tokens:,} tokens: {record.tokens_from}",
        "largest logit difference": f"{record.logit_difference:.2e} (relative {record.logit_difference_relative:.2e})",
        "loss": f"{record.parent_loss:.9f} -> {record.child_loss:.9f} ({record.child_loss - record.parent_loss:+.2e})",
    }
    if record.live_after_one is not None and record.live_after_two is not None:
        rows["new values with a gradient"] = (
            f"{record.live_after_one:.2%} after one pass, {record.live_after_two:.2%} after two, "
            f"of {record.new_entries:,}"
        )
    if record.gradients:
        worst = max(record.gradients, key=lambda row: row.error)
        rows["gradients by the dual rule"] = f"as predicted, within {worst.error:.2e}; largest error in {worst.tensor}"
    if record.gradient_limits:
        rows["no prediction"] = "; ".join(record.gradient_limits)
    return facts_table(f"{record.parent} -> {record.child}", rows)


def _residual(record: DeepRecord) -> "Table":
    from megagrow.report.tables import Column, Table

    columns = (
        Column("layer", "layer"),
        Column("parent_layer", "parent's layer"),
        Column("parent", "RMS, parent"),
        Column("child", "RMS, child"),
    )
    rows = tuple(
        (
            str(row.layer or "embedding"),
            "new" if row.parent_layer is None else str(row.parent_layer or "embedding"),
            None if row.parent is None else f"{row.parent:.6f}",
            f"{row.child:.6f}",
        )
        for row in record.residual
    )
    return Table(title="residual stream after each layer", columns=columns, rows=rows)


def _copies(record: DeepRecord) -> "Table":
    from megagrow.report.tables import Column, Table

    columns = (
        Column("axis", "axis"),
        Column("copies", "copies", "integer"),
        Column("weights", "cosine of weights"),
        Column("updates", "cosine of updates"),
    )
    rows = tuple(
        (row.axis, row.copies, f"{row.weights:.9f}", None if row.updates is None else f"{row.updates:.9f}")
        for row in record.copies
    )
    note = "Updates with cosine 1: the copies stay equal forever (docs/operators.md: moments, share_of_new)."
    title = f"copies and their sources after {record.steps} steps of Adam"
    return Table(title=title, columns=columns, rows=rows, footnotes=(note,))


def _gradients(record: DeepRecord) -> "Table":
    from megagrow.report.tables import Column, Table

    columns = (Column("tensor", "tensor"), Column("entries", "values", "integer"), Column("error", "relative error"))
    rows = tuple((row.tensor, row.entries, f"{row.error:.2e}") for row in record.gradients)
    return Table(title="predicted and actual gradients", columns=columns, rows=rows)
