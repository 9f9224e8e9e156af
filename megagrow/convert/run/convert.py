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

from megagrow.bounded import read_json_object
from megagrow.checkpoint.directory import MANIFEST, Manifest, integrity, iterations, read_manifest, write_manifest
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.formats.megatron_common import carried_arguments, grown_common
from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.checkpoint.tensors import write_growth_record
from megagrow.convert.make import import_torch
from megagrow.convert.plan import ConversionPlan, Order
from megagrow.convert.run.lineage import adopted_manifest, describes_same, target_manifest
from megagrow.convert.run.publish import make_and_publish
from megagrow.convert.run.target import TargetSpec
from megagrow.convert.targets import TorchDistTarget
from megagrow.convert.work import (
    CHECKED,
    ConversionRun,
    Journal,
    Progress,
    RunOptions,
    checked_files,
    drop_journal,
    worker_rank,
)
from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep
from megagrow.records import ConversionRecord
from megagrow.tracker import TRACKER

RECORD = "conversion.json"


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion that was checked and planned."""

    order: Order
    opened: OpenCheckpoint
    conversion: ConversionPlan
    manifest: Manifest

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

    A grown checkpoint is iteration 0 of its stage; with an equal shape the checkpoint is only resharded and keeps its
    iteration. A target that was made from this very source is left as it is, so a conversion may be requested twice.
    Several processes that request the same conversion, as ranks of torchrun or srun, share the work.

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
    started, options, rank = time.time(), options or RunOptions(), worker_rank()
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
        has_checked=rank.rank == 0 and options.contents,
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
    prepared = _prepare(source, target, RunOptions(contents=False), check=False)
    return prepared, TorchDistTarget(prepared.conversion, None)


def _prepare(source: Path, target: TargetSpec, options: RunOptions, *, check: bool) -> PreparedConversion:
    """Open and check the source, and plan, so that an impossible conversion is refused before anything is written."""
    if _is_sealed(source):
        integrity.check(source, contents=options.contents and check)
    opened = open_checkpoint(source, shape=target.source_shape, optimizer=target.optimizer)
    small = opened.shape or target.source_shape
    if small is None:
        raise CheckpointError(
            f"{source}: does not record its model's shape; give it as source.num_layers=..., source.hidden_size=..., "
            "source.ffn_hidden_size=..., source.num_attention_heads=..., source.vocab_size=..., source.seq_length=..."
        )
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
    )
    try:
        conversion = order.conversion(opened.source)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if conversion.needs_torch:  # import it as early as possible
        if options.warmup is not None:
            options.warmup.import_torch()
        import_torch()
    is_own = (source / MANIFEST).is_file()
    parent = read_manifest(source) if is_own else adopted_manifest(source, opened, small, target)
    manifest = target_manifest(conversion.step, source, parent, target)
    return PreparedConversion(
        order, opened, conversion, manifest.model_copy(update={"optimizer": conversion.optimizer})
    )


def _finish(run: ConversionRun, prepared: PreparedConversion, started: float) -> ConversionRecord:
    """Write everything but the tensors, and a record of how the checkpoint was made; seal it."""
    staging, source, step = run.staging, run.order.source, prepared.step
    if _is_sealed(source) and not Journal(staging).marked(CHECKED):  # rank 0 has not finished its check, or died
        integrity.check(source, contents=run.options.contents)
    files = checked_files(run)
    write_manifest(staging, prepared.manifest)
    if step.operators:
        write_growth_record(staging, step)
    TorchDistTarget(prepared.conversion, None).finish(staging, _unsharded(prepared))
    record = ConversionRecord(
        time=time.time(),
        source=str(source),
        target=str(run.final),
        operators=step.operators,
        moments=step.moments.value,
        exact=step.exact,
        tensors=len(prepared.conversion.tasks),
        bytes_read=prepared.conversion.bytes_read,
        bytes_written=sum(file["size"] for file in files.values()),
        seconds=time.time() - started,
    )
    (staging / RECORD).write_text(record.model_dump_json())
    integrity.seal(staging, files, "sha256" if run.order.sha256 else "xxh3_128")
    return record


def _unsharded(prepared: PreparedConversion) -> dict[str, Any]:
    """The target's unsharded state. If megagrow did not write the source, it has everything that Megatron-LM needs."""
    common = grown_common(prepared.opened.common, prepared.step)
    args, order = common.get("args"), prepared.order
    if (order.source / MANIFEST).is_file() and args is None:
        return common
    common.pop("rerun_state_machine", None)  # it belongs to the run that wrote the source
    iteration = prepared.manifest.iteration
    arguments = carried_arguments(
        args if isinstance(args, dict) else {},
        order.large,
        order.layout,
        prepared.conversion.weight_dtype,
        iteration=iteration,
        ckpt_format="torch_dist",
        no_save_optim=not prepared.conversion.optimizer,
        no_save_rng=True,
    )
    return {"checkpoint_version": 3.0, **common, "iteration": iteration, "args": arguments}


def _is_sealed(source: Path) -> bool:
    """Whether a checkpoint has checksums, or should have them."""
    return (source / MANIFEST).is_file() or (source / integrity.INTEGRITY).is_file()


def _existing_record(save: Path, final: Path, manifest: Manifest) -> ConversionRecord:
    """The record of a target that already exists; CheckpointError if it is another checkpoint."""
    if not describes_same(read_manifest(final), manifest):
        raise CheckpointError(
            f"{final}: another checkpoint already exists here; it is not touched (--overwrite replaces it)"
        )
    try:
        record = ConversionRecord.model_validate(read_json_object(final / RECORD))
    except (OSError, ValueError):
        raise CheckpointError(f"{final / RECORD}: missing or damaged") from None
    drop_journal(final)  # left there by a kill right after the publication
    _repair_tracker(save, manifest.iteration)
    return record


def _repair_tracker(save: Path, iteration: int) -> None:
    """Write a missing tracker: a kill came before it was written, or another rank is about to write it."""
    if iterations.published(save) == [iteration] and not (save / TRACKER).is_file():
        with suppress(FileNotFoundError):  # another rank was faster
            iterations.write_tracker(save, iteration)
