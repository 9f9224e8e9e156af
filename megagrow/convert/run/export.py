"""Exports a checkpoint's weights in another format: Hugging Face's safetensors, or Megatron's older mp_rank files.

A Hugging Face target can be another, larger model: then the source's weights are grown while they are written.

As in every conversion the target appears whole, by one rename, and a killed export is resumed by the same command.
Adam's state is left out: neither format has a place for it that other programs would read.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.directory import MANIFEST, Manifest, iterations, read_manifest
from megagrow.checkpoint.formats import open_checkpoint, resolve_directory
from megagrow.checkpoint.tensors import check_tensors, model_tensors, read_growth_record, recorded_step
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
from megagrow.convert.targets import PlannedTarget, describe_growth, plan_target
from megagrow.convert.work import ConversionRun, Progress, RunOptions, checked_files, worker_rank
from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep
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
        operators: of the growth, by axis; none where the source's model was only written in another format.
        exact: whether they preserve the function.
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
    operators: Mapping[str, str]
    exact: bool


def order_export(
    source: Path,
    to: Format,
    precision: StoredPrecision,
    layout: ParallelLayout,
    shape: ModelShape,
    tokenizer: Path | None,
    ignored_arguments: tuple[str, ...] = (),
    *,
    large: ModelShape | None = None,
    growth: GrowthConfig | None = None,
    seed: int = 0,
) -> Order:
    """The order of an export of a model of a shape, which becomes `large` on the way."""
    return Order(
        source=resolve_directory(source),
        to=to,
        small=shape,
        large=large or shape,
        growth=growth or GrowthConfig(),
        seed=seed,
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
    step = order.step if order.grows else None
    grown = step if step is not None and step.operators else _recorded_step(order.source, order.large)
    dtype = DTYPE_OF_PRECISION[order.precision]
    cast = describe_cast(model_tensors(opened.source.tensors), dtype)
    storage = order.conversion(opened).storage if order.grows else cast
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
        if order.to == "huggingface" and grown is not None:
            _describe_growth(run, planned, grown, storage.words)
        return how, non_finite

    compared, non_finite = make_and_publish(run, finish) or (compared, {})
    _write_missing_tracker(order, target, iteration)
    notes = (*opened.notes, *type_notes(opened.source.tensors, dtype), *planned.notes)
    return ExportResult(
        target=final,
        format=order.to,
        bytes=sum(file.size for unit in planned.units for file in unit),
        seconds=time.time() - started,
        notes=notes,
        checksums=compared,
        non_finite=non_finite,
        storage=storage.words,
        rounded=storage.rounded,
        operators={} if step is None else step.operators,
        exact=step is None or step.exact,
    )


def _describe_growth(run: ConversionRun, planned: PlannedTarget, step: GrowthStep, storage: str) -> None:
    """Write what is new into an export of a model that was grown, now or before."""
    source, parent, since = run.order.source, None, 0
    if not run.order.grows:
        manifest = read_manifest(source)
        parent, since = _ancestor_in_words(manifest), manifest.iteration
    describe_growth(run.staging, planned, step, source, storage, parent=parent, steps_since=since)


def _ancestor_in_words(manifest: Manifest) -> str | None:
    """The checkpoint that a model was last grown from: by the name of its directory, or as a stage of a family."""
    if not manifest.lineage:
        return None
    last = manifest.lineage[-1]
    name = Path(last.path).name
    return f"stage {last.stage} of {last.family}, iteration {last.iteration}" if name.startswith("iter_") else name


def _recorded_step(source: Path, shape: ModelShape) -> GrowthStep | None:
    """The growth step that one of our checkpoints was made by, if it was grown."""
    record = read_growth_record(source) if (source / MANIFEST).is_file() else None
    return None if record is None else recorded_step(record, shape)


def _write_missing_tracker(order: Order, target: Path, iteration: int) -> None:
    """Write the tracker of a directory of legacy iterations that has none: it is new, or a kill came before it."""
    if order.to == "legacy" and not (target / TRACKER).is_file():
        iterations.write_tracker(target, iteration)
