"""From a published checkpoint to another one, grown or resharded or both: check, plan, make, describe, publish.

The target does not exist before its last rename. What is being made lies in a hidden directory with a journal; a
conversion that is killed, or that several processes were started for, goes on there. The source is only ever read.
"""

import errno
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megagrow
from megagrow.checkpoint.directory import (
    MANIFEST,
    Ancestor,
    Manifest,
    integrity,
    iterations,
    read_manifest,
    write_manifest,
)
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.formats.megatron_common import carried_arguments, grown_common
from megagrow.checkpoint.index import OpenCheckpoint
from megagrow.checkpoint.tensors import write_growth_record
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.make import import_torch
from megagrow.convert.plan import ConversionPlan, Order, Precision, is_copy
from megagrow.convert.targets import TorchDistTarget
from megagrow.convert.work import (
    CHECKED,
    FINISH,
    Journal,
    Progress,
    RunOptions,
    allowed_piece_values,
    check_alone,
    check_made,
    check_unchanged,
    drop_journal,
    make_files,
    publish_target,
    wait,
    worker_rank,
)
from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep
from megagrow.records import ConversionRecord
from megagrow.tracker import TRACKER

RECORD = "conversion.json"
_POLL = 0.5


@dataclass(frozen=True)
class TargetSpec:
    """What a checkpoint shall become.

    Attributes:
        stage: name of the stage that it begins.
        shape, layout, growth, precision: of that stage.
        seed: of the random parts.
        source_shape: of the source, where that does not say it itself.
        optimizer: take Adam's state along.
    """

    stage: str
    shape: ModelShape
    layout: ParallelLayout
    growth: GrowthConfig
    precision: Precision
    seed: int
    source_shape: ModelShape | None = None
    optimizer: bool = True


def convert_checkpoint(
    source: Path,
    save: Path,
    target: TargetSpec,
    how: RunOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> ConversionRecord:
    """Grow and reshard a checkpoint into `save`, and point its tracker there.

    A grown checkpoint is iteration 0 of its stage; with an equal shape it is only resharded and keeps its iteration.
    A target that was made from this very source is left as it is, so a conversion may be asked for twice. Several
    processes that are asked for the same, as ranks of torchrun or srun, share the work.

    Args:
        source: a checkpoint's directory, of any format that is read.
        save: directory of the next stage's checkpoints.
        target: what it shall become.
        how: workers, memory, and what to do about what is there.
        progress: told (bytes written, bytes in all).

    Raises:
        CheckpointError: the source is not whole, is not of its shape, or the target is there already.
        GrowthError: an operator cannot do the step.
    """
    begun, how, here = time.time(), how or RunOptions(), worker_rank()
    job = _prepare(source, target, how, check=here.rank == 0)
    final = iterations.iteration_path(save, job.manifest.iteration)
    if final.exists() and not how.overwrite:
        return _found(save, final, job.manifest)
    check_alone(how, here, final)
    _mend_tracker(save, job.manifest.iteration)
    latest = iterations.read_tracker(save)
    if latest is not None and latest > job.manifest.iteration:
        raise CheckpointError(
            f"{save}: stage {job.manifest.stage!r} stands at iteration {latest} already; it is not touched"
        )
    allowed_piece_values(how, here)
    save.mkdir(parents=True, exist_ok=True)
    iterations.sweep(save)
    staging = iterations.conversion_staging(final)
    if how.restart:
        shutil.rmtree(staging, ignore_errors=True)
    fresh = not staging.is_dir()
    try:
        if not make_files(job.order, job.opened, staging, final, how, here, progress):
            return _found(save, final, job.manifest)
        if here.rank == 0 and how.contents:
            Journal(staging).mark(CHECKED)
        if record := _finish_or_wait(job, staging, final, how, begun):
            return record
    except FileNotFoundError:
        if staging.is_dir() and (here.count == 1 or not final.exists()):
            raise
        if not final.exists():
            raise CheckpointError(f"{staging}: somebody removed it while it was being written") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if here.count > 1:  # the others may be at work in there
            raise CheckpointError(f"{save}: the disk is full; make room, and give it again") from None
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"{save}: the disk is full; nothing of the new checkpoint is kept") from None
    except CheckpointError:
        if here.count == 1 and fresh and not _has_work(staging):
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return _found(save, final, job.manifest)  # another rank published it


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion that was checked and planned."""

    order: Order
    opened: OpenCheckpoint
    conversion: ConversionPlan
    manifest: Manifest

    @property
    def step(self) -> GrowthStep:
        """The maps."""
        return self.conversion.step


def plan_target_files(source: Path, target: TargetSpec) -> tuple[PreparedConversion, TorchDistTarget]:
    """Plan a conversion without carrying it out: for `--dry-run`."""
    job = _prepare(source, target, RunOptions(contents=False), check=False)
    return job, TorchDistTarget(job.conversion, None)


def _prepare(source: Path, target: TargetSpec, how: RunOptions, *, check: bool) -> PreparedConversion:
    """Open and check the source, and plan: what cannot be converted is refused before anything is written."""
    if _sealed(source):
        integrity.check(source, contents=how.contents and check)
    opened = open_checkpoint(source, shape=target.source_shape, optimizer=target.optimizer)
    small = opened.shape or target.source_shape
    if small is None:
        raise CheckpointError(
            f"{source}: does not say its model's shape; give it as source.num_layers=..., source.hidden_size=..., "
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
        sha256=how.sha256,
        seed=target.seed,
    )
    try:
        conversion = order.conversion(opened.source)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if not is_copy(conversion, opened.source):  # as early as can be
        if how.crew is not None:
            how.crew.warm()
        import_torch()
    parent = read_manifest(source) if (source / MANIFEST).is_file() else _adopted(source, opened, small, target)
    manifest = _manifest(conversion.step, source, parent, target)
    return PreparedConversion(
        order, opened, conversion, manifest.model_copy(update={"optimizer": conversion.optimizer})
    )


def _finish_or_wait(
    job: PreparedConversion, staging: Path, final: Path, how: RunOptions, begun: float
) -> ConversionRecord | None:
    """Finish and publish what is made; None if another rank does."""
    while not final.exists() or how.overwrite:
        journal = Journal(staging)
        with journal.alive():
            if journal.claim(FINISH):
                record = _finish(job, staging, final, how, begun)
                if journal.holds(FINISH):
                    publish_target(staging, final, replace=how.overwrite)
                    iterations.write_tracker(final.parent, job.manifest.iteration)
                    return record
        wait(_POLL)
    return None


def _finish(job: PreparedConversion, staging: Path, final: Path, how: RunOptions, begun: float) -> ConversionRecord:
    """Write all but the tensors, and a record of how the checkpoint was made; seal it."""
    journal, source = Journal(staging), job.order.source
    if _sealed(source) and not journal.marked(CHECKED):  # rank 0 is still at it, or gone
        integrity.check(source, contents=how.contents)
    check_unchanged(job.order, journal)
    known: dict[str, Any] = {}
    for told in journal.finished().values():
        known |= told
    check_made(staging, known)
    write_manifest(staging, job.manifest)
    if job.step.operators:
        write_growth_record(staging, job.step)
    production = TorchDistTarget(job.conversion, None)
    production.finish(staging, _unsharded(job))
    record = ConversionRecord(
        time=time.time(),
        source=str(job.order.source),
        target=str(final),
        operators=job.step.operators,
        moments=job.step.moments.value,
        exact=job.step.exact,
        tensors=len(job.conversion.tasks),
        bytes_read=job.conversion.bytes_read,
        bytes_written=sum(file["size"] for file in known.values()),
        seconds=time.time() - begun,
    )
    (staging / RECORD).write_text(record.model_dump_json())
    integrity.seal(staging, known, "sha256" if job.order.sha256 else "xxh3_128")
    return record


def _unsharded(job: PreparedConversion) -> dict[str, Any]:
    """What is not sharded of the target: of one that megagrow did not write with all that Megatron-LM asks for."""
    common = grown_common(job.opened.common, job.step)
    args, target = common.get("args"), job.conversion
    if (job.order.source / MANIFEST).is_file() and args is None:
        return common
    common.pop("rerun_state_machine", None)  # of the run that was
    iteration = job.manifest.iteration
    arguments = carried_arguments(
        args if isinstance(args, dict) else {},
        job.order.large,
        job.order.layout,
        target.weight_dtype,
        iteration=iteration,
        ckpt_format="torch_dist",
        no_save_optim=not target.optimizer,
        no_save_rng=True,
    )
    return {"checkpoint_version": 3.0, **common, "iteration": iteration, "args": arguments}


def _sealed(source: Path) -> bool:
    """Whether there are checksums, or should be."""
    return (source / MANIFEST).is_file() or (source / integrity.INTEGRITY).is_file()


def _has_work(staging: Path) -> bool:
    """Whether an interrupted conversion has finished anything worth keeping."""
    return staging.is_dir() and bool(Journal(staging).finished_units())


def _found(save: Path, final: Path, manifest: Manifest) -> ConversionRecord:
    """The record of a target that is there already; CheckpointError if it was made from something else."""
    found = read_manifest(final)
    if _meaning(found) != _meaning(manifest):
        raise CheckpointError(
            f"{final}: there is another checkpoint already; it is not touched (--overwrite replaces it)"
        )
    try:
        record = ConversionRecord.model_validate_json((final / RECORD).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{final / RECORD}: missing or damaged") from None
    drop_journal(final)  # a kill may have come right after the publishing
    _mend_tracker(save, manifest.iteration)
    return record


def _mend_tracker(save: Path, iteration: int) -> None:
    """Write the tracker where a kill came before that, or another rank is just about to."""
    if iterations.published(save) == [iteration] and not (save / TRACKER).is_file():
        with suppress(FileNotFoundError):  # another rank was quicker
            iterations.write_tracker(save, iteration)


def _meaning(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says but for who wrote it, and where its ancestors lay: their sha256 says which they were."""
    return manifest.model_dump(exclude={"version": True, "lineage": {"__all__": {"path", "version"}}})


def _adopted(source: Path, opened: OpenCheckpoint, shape: ModelShape, target: TargetSpec) -> Manifest:
    """What a checkpoint that megagrow did not write would say of itself."""
    arguments = opened.common.get("args")
    arguments = arguments if isinstance(arguments, dict) else {}
    iteration = opened.common.get("iteration", arguments.get("iteration", 0))
    samples = int(arguments.get("consumed_train_samples") or 0)
    return Manifest(
        family=source.resolve().parent.name or "adopted",
        stage=target.stage,
        iteration=int(iteration or 0),
        shape=shape,
        layout=opened.layout or ParallelLayout(),
        precision=target.precision,
        position={},
        consumed_samples=samples,
        consumed_tokens=samples * shape.seq_length,
        flops=0.0,
    )


def _manifest(step: GrowthStep, source: Path, parent: Manifest, target: TargetSpec) -> Manifest:
    """The target's manifest: resharded as it is, or a new stage that goes on in the data where its parent stopped."""
    layout = {"layout": target.layout, "precision": target.precision, "version": megagrow.__version__}
    if not step.operators:
        return parent.model_copy(update=layout)
    ancestor = Ancestor(
        path=str(source),
        sha256=integrity.fingerprint(source),
        family=parent.family,
        stage=parent.stage,
        iteration=parent.iteration,
        shape=parent.shape,
        operators=step.operators,
        moments=step.moments.value,
        noise=step.noise,
        options=target.growth,
        seed=step.seed,
        exact=step.exact,
        version=megagrow.__version__,
    )
    grown = {"stage": target.stage, "iteration": 0, "shape": target.shape, "flops": 0.0}
    grown |= {"schedule": None, "threads": None}
    return parent.model_copy(update={**layout, **grown, "lineage": (*parent.lineage, ancestor)})
