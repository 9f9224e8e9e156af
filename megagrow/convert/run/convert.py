"""Converts a published checkpoint into another one, grown or resharded or both: check, plan, make, describe, publish.

The target does not exist before its last rename, and the source is only ever read. A killed conversion is resumed by
the same command; several processes that run the same command share the work.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import MANIFEST, Manifest, integrity, iterations, read_manifest, write_manifest
from megagrow.checkpoint.formats import open_checkpoint, resolve_directory
from megagrow.checkpoint.formats.megatron_common import (
    at_schedule_start,
    carried_arguments,
    common_of_layout,
    grown_common,
    resumable,
)
from megagrow.checkpoint.formats.torch_dist import carried_states, scaling_states
from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.checkpoint.reading import ChunkReader
from megagrow.checkpoint.tensors import ShapeNotRecordedError, write_growth_record
from megagrow.config import ModelShape, check_growth
from megagrow.config.function import Part, differences
from megagrow.convert.make import import_torch
from megagrow.convert.plan import ConversionPlan, Order, file_states, type_notes
from megagrow.convert.run.compare import compare_source, compared_at_end, non_finite_values
from megagrow.convert.run.lineage import adopted_manifest, describes_same, target_manifest
from megagrow.convert.run.publish import make_and_publish
from megagrow.convert.run.target import TargetSpec, check_place
from megagrow.convert.targets import TorchDistTarget
from megagrow.convert.work import (
    ConversionRun,
    Progress,
    RunOptions,
    checked_files,
    drop_journal,
    worker_rank,
)
from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json_object
from megagrow.growth.maps import GrowthStep
from megagrow.records import Compared, ConversionRecord
from megagrow.tracker import TRACKER

RECORD = "conversion.json"


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion that was checked and planned; `common` is the target's unsharded state."""

    order: Order
    opened: OpenCheckpoint
    conversion: ConversionPlan
    manifest: Manifest
    compared: Compared
    common: dict[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: of the source, and of weights that stay wider than the rest or are rounded."""
        return (
            *self.opened.notes,
            *_note_on_positions(self.order),
            *_note_on_padding(self.order),
            *type_notes(self.opened.source.tensors, self.conversion.weight_dtype),
        )

    @property
    def step(self) -> GrowthStep:
        """The growth step with its maps."""
        return self.conversion.step


def convert_checkpoint(
    source: Path,
    save: Path,
    target: TargetSpec,
    options: RunOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> ConversionRecord:
    """Grow and reshard a checkpoint into `save`, and point its tracker there.

    A checkpoint that becomes another stage is iteration 0 of that, unless the target says to go on with the schedule;
    otherwise, with an equal shape, it is only resharded and keeps its iteration. A target that was made from this very
    source is left as it is, so a conversion may be requested twice. Several processes that request the same
    conversion, as ranks of torchrun or srun, share the work.

    Args:
        source: a checkpoint's directory, of any format that can be read.
        save: directory of the next stage's checkpoints.
        target: the stage that the checkpoint becomes.
        options: workers, memory, and how to treat existing files.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: the source is damaged or not of its shape, or another target exists.
        GrowthError: an operator cannot do the step.
    """
    check_place(save)
    started, options, rank = time.time(), options or RunOptions(), worker_rank()
    source = resolve_directory(source)
    source_files = file_states(source)  # before anything of it is read
    prepared = _prepare(source, target, options, check=rank.rank == 0)
    iteration = prepared.manifest.iteration
    final = iterations.iteration_path(save, iteration)
    if final.exists() and not options.overwrite:
        return _existing_record(save, final, prepared.manifest)
    run = ConversionRun(
        prepared.order,
        prepared.opened,
        final,
        options,
        rank,
        progress,
        source_files,
        compared=prepared.compared,
        tracker=iteration,
    )
    _repair_tracker(save, iteration)
    latest = iterations.read_tracker(save)
    if latest is not None and latest > iteration:
        raise CheckpointError(
            f"{save}: stage {prepared.manifest.stage!r} is already at iteration {latest}; it is not touched"
        )
    iterations.sweep(save)
    record = make_and_publish(run, partial(_finish, run, prepared, started))
    return record or _existing_record(save, final, prepared.manifest)  # another rank has published it


def plan_target_files(source: Path, target: TargetSpec) -> tuple[PreparedConversion, TorchDistTarget]:
    """Plan a conversion without carrying it out: for `--dry-run`."""
    prepared = _prepare(resolve_directory(source), target, RunOptions(contents=False), check=False)
    return prepared, TorchDistTarget(prepared.conversion, None)


def _prepare(source: Path, target: TargetSpec, options: RunOptions, *, check: bool) -> PreparedConversion:
    """Open and check the source, and plan, so that an impossible conversion is refused before anything is written."""
    compared = compare_source(source, options, is_first=check)
    opened = open_checkpoint(
        source,
        shape=target.source_shape,
        optimizer=target.optimizer,
        ignored_arguments=target.ignored_arguments,
        checksums=options.checksums,
    )
    small = opened.shape or target.source_shape
    if small is None:
        raise ShapeNotRecordedError(source, {key: info.shape for key, info in opened.source.tensors.items()})
    _check_stage(source, small, target)
    order = Order(
        source=source,
        small=small,
        large=target.shape,
        growth=target.growth,
        layout=target.layout,
        precision=target.precision,
        optimizer=target.optimizer,
        sha256=options.sha256,
        seed=target.seed,
        ignored_arguments=target.ignored_arguments,
    )
    try:
        conversion = order.conversion(opened)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if conversion.needs_torch:  # import it as early as possible
        if options.warmup is not None:
            options.warmup.import_torch()
        import_torch()
    is_own = (source / MANIFEST).is_file()
    parent = read_manifest(source) if is_own else adopted_manifest(source, opened, small, target)
    manifest = target_manifest(conversion.step, source, parent, target, conversion.storage)
    manifest = manifest.model_copy(update={"optimizer": conversion.optimizer})
    common = _unsharded(order, opened, conversion, manifest)
    return PreparedConversion(order, opened, conversion, manifest, compared, common)


def _note_on_positions(order: Order) -> tuple[str, ...]:
    """A note if rotary positions that the source was made for are not in the target, whose exports then lack them."""
    small, large = order.small, order.large
    rotary = large.position_embedding_type == "rope"
    if not rotary or large.max_position_embeddings is not None or small.positions <= large.positions:
        return ()
    return (
        f"the source is made for {small.positions:,} positions and the target for its seq_length, {large.positions:,}; "
        f"exports name that number: to keep the source's, set model.max_position_embeddings: {small.positions}",
    )


def _note_on_padding(order: Order) -> tuple[str, ...]:
    """A note if the vocabulary only gets other padding: Megatron's loss counts such rows, exports leave them out."""
    before, after = order.small.padded_vocab_size, order.large.padded_vocab_size
    if order.small.vocab_size != order.large.vocab_size or before == after:
        return ()
    return (
        f"the vocabulary of {order.large.vocab_size:,} is padded to {after:,} rows instead of {before:,}; no token's "
        "logit changes, but a loss over all rows counts the new ones, too",
    )


def _check_stage(source: Path, shape: ModelShape, target: TargetSpec) -> None:
    """Raise CheckpointError if the source's model cannot become the target's: a function or an axis is another.

    A stage that loads its first checkpoint names no growth, so nothing may differ but the rows of padding.
    """
    axes = differences(shape, target.shape, Part.AXIS) if target.load is not None else []
    if sizes := [each for each in axes if each.field != "padded_vocab_size"]:
        found = ", ".join(f"{each.field} is {each.source} in it and {each.target} in the stage" for each in sizes)
        raise CheckpointError(
            f"{source}: not the model of stage {target.stage!r}, which loads it: {found}; to grow it, take it as it is "
            "for the first stage (finished: true) and let the next stage grow from it"
        )
    try:
        check_growth(f"growth from the checkpoint to {target.stage!r}", shape, target.shape, target.growth.granularity)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _finish(run: ConversionRun, prepared: PreparedConversion, started: float) -> ConversionRecord:
    """Write everything but the tensors, and a record of how the checkpoint was made; seal it."""
    staging, step = run.staging, prepared.step
    compared = compared_at_end(run)
    files, non_finite = checked_files(run), non_finite_values(run)
    write_manifest(staging, prepared.manifest)
    if step.operators:
        write_growth_record(staging, step)
    reader = prepared.opened.source
    states: dict[str, bytes] = {}
    if not step.operators and isinstance(reader, ChunkReader):  # another shape has other scales
        states = carried_states(reader, scaling_states(reader))
    TorchDistTarget(prepared.conversion, None).finish(staging, prepared.common, states)
    record = ConversionRecord(
        time=time.time(),
        source=str(run.order.source),
        target=str(run.final),
        operators=step.operators,
        moments=step.moments.value if prepared.conversion.optimizer else "none",
        exact=step.exact,
        storage=prepared.conversion.storage.words,
        rounded=prepared.conversion.storage.rounded,
        tensors=len(prepared.conversion.tasks),
        bytes_read=prepared.conversion.bytes_read,
        bytes_written=sum(file["size"] for file in files.values()),
        seconds=time.time() - started,
        notes=prepared.notes,
        checksums=compared,
        non_finite=non_finite,
    )
    (staging / RECORD).write_text(record.model_dump_json())
    integrity.seal(staging, files, "sha256" if run.order.sha256 else "xxh3_128")
    return record


def _unsharded(order: Order, opened: OpenCheckpoint, conversion: ConversionPlan, manifest: Manifest) -> dict[str, Any]:
    """The target's unsharded state, with everything that Megatron-LM needs to go on with it."""
    common = grown_common(opened.common, conversion.step)
    if manifest.iteration == 0:
        common = at_schedule_start(common)
    if conversion.optimizer:
        apart = order.large.num_moe_experts is not None and order.layout.expert_model_parallel_size > 1
        common = common_of_layout(common, order.source, experts_apart=apart)
    else:
        common.pop("optimizer", None)
    args, iteration = common.get("args"), manifest.iteration
    common.pop("rerun_state_machine", None)  # it belongs to the run that wrote the source
    arguments = carried_arguments(
        args if isinstance(args, dict) else {},
        order.large,
        order.layout,
        conversion.weight_dtype,
        iteration=iteration,
        ckpt_format="torch_dist",
        no_save_optim=not conversion.optimizer,
        no_save_rng=True,
        **({} if iteration else {"consumed_train_samples": 0, "consumed_valid_samples": 0}),
    )
    return resumable({**common, "iteration": iteration}, arguments, None, manifest.flops)


def _existing_record(save: Path, final: Path, manifest: Manifest) -> ConversionRecord:
    """The record of a target that already exists; CheckpointError if it is another checkpoint."""
    if not describes_same(read_manifest(final), manifest):
        raise CheckpointError(
            f"{final}: another checkpoint already exists here; it is not touched (--overwrite replaces it)"
        )
    record = read_conversion_record(final)
    if record is None:
        raise CheckpointError(f"{final / RECORD}: missing or damaged")
    drop_journal(final)  # left there by a kill right after the publication
    _repair_tracker(save, manifest.iteration)
    if (iterations.read_tracker(save) or 0) < manifest.iteration:  # a kill came before the tracker was moved on to it
        iterations.write_tracker(save, manifest.iteration)
    return record


def read_conversion_record(path: Path) -> ConversionRecord | None:
    """Return the record of how a checkpoint was made; None if it has none that can be read."""
    try:
        return ConversionRecord.model_validate(read_json_object(path / RECORD))
    except (OSError, ValueError):
        return None


def _repair_tracker(save: Path, iteration: int) -> None:
    """Write a missing tracker: a kill came before it was written, or another rank is about to write it."""
    if iterations.published(save) == [iteration] and not (save / TRACKER).is_file():
        with suppress(FileNotFoundError):  # another rank was faster
            iterations.write_tracker(save, iteration)
