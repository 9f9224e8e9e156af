"""What a conversion claims about its source: how its checksums were compared, and which values are not finite."""

from pathlib import Path

from megagrow.checkpoint.directory import integrity
from megagrow.convert.work import CHECKED, SKIPPED, ConversionRun, Journal, RunOptions
from megagrow.errors import CheckpointError
from megagrow.records import Compared


def compare_source(source: Path, options: RunOptions, *, is_first: bool) -> Compared:
    """Compare a source's files with its integrity.json, as far as that is not done while it is read.

    Args:
        source: the checkpoint's own directory, of any format.
        options: whether checksums are compared.
        is_first: whether this process is the one that reads whole files; the others compare names and sizes.

    Returns:
        `blocks`: each block is compared when it is read. `files`: the hash of each file is compared here, because the
        source has no checksums of blocks. `skipped`: the options say so. `none`: it has no checksums.

    Raises:
        CheckpointError: a file is missing or damaged, or megagrow wrote the source and its integrity.json is missing.
    """
    known = integrity.recorded(source)
    if known is None:
        return "none"
    in_one_pass = options.checksums and options.contents and not known.blocks
    integrity.compare(source, known, contents=in_one_pass and is_first)
    if not options.checksums or not (known.blocks or in_one_pass):
        return "skipped"
    return "blocks" if known.blocks else "files"


def compared_at_end(run: ConversionRun) -> Compared:
    """Return how all that was read has been compared, by this run and by those that it resumed.

    Hashes of whole files are compared now if the process that should have done it has not finished, or died.
    """
    source, journal = run.order.source, Journal(run.staging)
    if run.compared == "files" and not journal.marked(CHECKED):
        compare_source(source, run.options, is_first=True)
    return "skipped" if journal.marked(SKIPPED) else run.compared


def non_finite_values(run: ConversionRun) -> dict[str, int]:
    """Return the number of values in each target tensor that are not finite.

    Raises:
        CheckpointError: there are some, written by an earlier run that allowed them, and this one does not.
    """
    found = Journal(run.staging).non_finite()
    if found and not run.options.allow_non_finite:
        name, count = next(iter(found.items()))
        raise CheckpointError(
            f"{run.order.source}: {name}: {count} values are NaN or infinite, and {len(found) - 1} other tensors have "
            "such values; nothing was published; give --allow-non-finite again, or --restart"
        )
    return found
