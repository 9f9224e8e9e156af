"""Exports a checkpoint's weights in another format: Hugging Face's safetensors, or Megatron's older mp_rank files.

As in every conversion the target appears whole, by one rename, and a killed export is resumed by the same command.
Adam's state is left out: neither format has a place for it that other programs would read.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.formats import open_checkpoint, resolve_directory
from megagrow.checkpoint.tensors import check_tensors, model_tensors
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout, check_same_model
from megagrow.convert.plan import (
    DTYPE_OF_PRECISION,
    Format,
    Order,
    StoredPrecision,
    describe_cast,
    file_states,
    type_notes,
)
from megagrow.convert.run.compare import compare_source, compared_at_end, non_finite_values
from megagrow.convert.run.publish import make_and_publish
from megagrow.convert.run.target import check_place
from megagrow.convert.targets import plan_target
from megagrow.convert.work import ConversionRun, Progress, RunOptions, checked_files, worker_rank
from megagrow.errors import CheckpointError
from megagrow.records import Compared
from megagrow.tracker import TRACKER

_ANY_PIECE = 1 << 20
"""Values of a piece in a target that is planned but not produced."""


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        target: its directory.
        format: its format.
        bytes: size of the weight files.
        seconds: that it took.
        notes: what the user should know.
        checksums: how the source's checksums were compared.
        non_finite: number of NaN and infinite values in each tensor that has any.
        storage, rounded: what storing does to the values, and to how many tensors.
    """

    target: Path
    format: str
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    checksums: Compared
    non_finite: Mapping[str, int]
    storage: str
    rounded: int


def order_export(
    source: Path,
    to: Format,
    precision: StoredPrecision,
    layout: ParallelLayout,
    shape: ModelShape,
    tokenizer: Path | None,
    ignored_arguments: tuple[str, ...] = (),
) -> Order:
    """The order of an export."""
    return Order(
        source=resolve_directory(source),
        to=to,
        small=shape,
        large=shape,
        growth=GrowthConfig(),
        layout=layout,
        precision=precision,
        optimizer=False,
        tokenizer=tokenizer,
        ignored_arguments=ignored_arguments,
    )


def export_checkpoint(
    order: Order, target: Path, options: RunOptions, progress: Progress = lambda done, total: None
) -> ExportResult:
    """Write a checkpoint's weights into `target`.

    Args:
        order: source, format, type and layout.
        target: for Hugging Face the directory itself; for the older Megatron format a directory of iterations.
        options: workers, memory, and how to treat existing files.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: the format cannot express the shape, the source is not whole, or the target exists.
    """
    if options.overwrite or order.to == "legacy" or not os.path.exists(target):  # else what exists is named below
        check_place(target)
    started, source_files = time.time(), file_states(order.source)  # before anything of it is read
    rank = worker_rank()
    compared = compare_source(order.source, options, is_first=rank.rank == 0)
    opened = open_checkpoint(
        order.source,
        shape=order.small,
        optimizer=False,
        ignored_arguments=order.ignored_arguments,
        checksums=options.checksums,
    )
    if opened.shape is not None:
        try:
            check_same_model(opened.shape, order.small, ("the checkpoint", "the model to export"))
        except ValueError as error:
            raise CheckpointError(f"{order.source}: not the model to export: {error}") from None
    check_tensors(model_tensors(opened.source.tensors), order.small, optimizer=False)
    # planned here as well, so that an impossible export is refused before anything is written
    planned = plan_target(order, opened, lambda: _ANY_PIECE)
    iteration = int(opened.common.get("iteration") or 0)
    final = iterations.iteration_path(target, iteration) if order.to == "legacy" else target
    if final.exists() and not options.overwrite:
        _write_missing_tracker(order, target, iteration)
        raise CheckpointError(f"{final}: already exists; it is not touched (--overwrite replaces it)")
    run = ConversionRun(order, opened, final, options, rank, progress, source_files, compared)

    def finish() -> tuple[Compared, dict[str, int]]:
        how, non_finite = compared_at_end(run), non_finite_values(run)
        checked_files(run)
        planned.finish(run.staging, opened.common)
        return how, non_finite

    compared, non_finite = make_and_publish(run, finish) or (compared, {})
    _write_missing_tracker(order, target, iteration)
    notes = (*opened.notes, *type_notes(opened.source.tensors, DTYPE_OF_PRECISION[order.precision]), *planned.notes)
    size = sum(file.size for unit in planned.units for file in unit)
    storage = describe_cast(model_tensors(opened.source.tensors), DTYPE_OF_PRECISION[order.precision])
    seconds = time.time() - started
    return ExportResult(
        final, order.to, size, seconds, notes, compared, non_finite, storage=storage.words, rounded=storage.rounded
    )


def _write_missing_tracker(order: Order, target: Path, iteration: int) -> None:
    """Write the tracker of a directory of legacy iterations that has none: it is new, or a kill came before it."""
    if order.to == "legacy" and not (target / TRACKER).is_file():
        iterations.write_tracker(target, iteration)
