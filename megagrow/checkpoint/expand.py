"""From a published checkpoint to the first one of the next stage: check, plan, convert, describe, publish.

The target does not exist before its last rename; a conversion that fails or is killed leaves a staging directory
that the next one sweeps away, and the source is only ever read.
"""

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import megagrow
from megagrow.checkpoint import directory
from megagrow.checkpoint.convert import Conversion, grown_common
from megagrow.checkpoint.manifest import Ancestor, Manifest, read_manifest, write_manifest
from megagrow.checkpoint.novelty import write_novelty
from megagrow.checkpoint.torch_dist import Reader, Writer
from megagrow.checkpoint.workers import Order, execute_order, plan_order
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.config.paths import TRACKER
from megagrow.errors import CheckpointError
from megagrow.growth.step import GrowthStep, plan_growth
from megagrow.records import ConversionRecord

RECORD = "conversion.json"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Target:
    """What a checkpoint shall become.

    Attributes:
        stage: name of the stage that it begins.
        shape, layout, growth, precision: of that stage.
        seed: of the random parts.
    """

    stage: str
    shape: ModelShape
    layout: ParallelLayout
    growth: GrowthConfig
    precision: Literal["bf16", "fp32"]
    seed: int


def expand(
    source: Path,
    save: Path,
    target: Target,
    *,
    contents: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionRecord:
    """Grow and reshard a checkpoint into `save`, and point its tracker there.

    A grown checkpoint is iteration 0 of its stage; with an equal shape it is only resharded and keeps its iteration.
    A target that was made from this very source is left as it is, so a conversion may be asked for twice.

    Args:
        source: an iteration directory.
        save: directory of the next stage's checkpoints.
        target: what it shall become.
        contents: compare the source's checksums first.
        workers: processes that convert; the result is the same for any number.
        progress: told (tasks done, tasks in all).

    Raises:
        CheckpointError: the source is not whole, is not of its shape, or the target is there already.
        GrowthError: an operator cannot do the step.
    """
    begun = time.time()
    directory.check(source, contents=contents)
    parent = read_manifest(source)
    step = plan_growth(parent.shape, target.shape, target.growth, target.seed)
    manifest = _manifest(step, source, parent, target)
    final = directory.iteration_path(save, manifest.iteration)
    if final.exists():
        record = _known_record(final, manifest)
        if directory.iterations(save) == [manifest.iteration] and not (save / TRACKER).is_file():
            directory.write_tracker(save, manifest.iteration)  # a kill came between the two renames
        return record
    latest = directory.read_tracker(save)
    if latest is not None and latest > manifest.iteration:
        raise CheckpointError(
            f"{save}: stage {manifest.stage!r} stands at iteration {latest} already; it is not touched"
        )
    reader = Reader(source)
    dtype = _DTYPES[target.precision]
    order = Order(source, Path(), parent.shape, target.shape, target.growth, target.layout, dtype, target.seed)
    try:
        plan_order(order, reader)  # what cannot be converted is refused before anything is written
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    save.mkdir(parents=True, exist_ok=True)
    directory.sweep(save)
    staging = directory.stage(final)
    try:
        writer = Writer(staging)
        conversion = execute_order(replace(order, staging=staging), reader, writer, workers, progress)
        record = _finish(conversion, reader, writer, (source, final), manifest, begun)
        directory.publish(staging, final)
        directory.write_tracker(save, manifest.iteration)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{save}: the disk is full; nothing of the new checkpoint is kept") from None
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return record


def _finish(
    conversion: Conversion, reader: Reader, writer: Writer, ends: tuple[Path, Path], manifest: Manifest, begun: float
) -> ConversionRecord:
    """Write all but the tensors, and a record of how the checkpoint was made; seal it."""
    staging, step = writer.path, conversion.step
    write_manifest(staging, manifest)
    if step.operators:
        write_novelty(staging, step)
    writer.finish(grown_common(reader.common(), step))
    record = ConversionRecord(
        time=time.time(),
        source=str(ends[0]),
        target=str(ends[1]),
        operators=step.operators,
        moments=step.moments.value,
        exact=step.exact,
        tensors=len(conversion.tasks),
        bytes_read=conversion.bytes_read,
        bytes_written=writer.bytes_written,
        seconds=time.time() - begun,
    )
    (staging / RECORD).write_text(record.model_dump_json())
    directory.seal(staging)
    return record


def _known_record(final: Path, manifest: Manifest) -> ConversionRecord:
    """The record of a target that is there already; CheckpointError if it was made from something else."""
    found = read_manifest(final)
    if _meaning(found) != _meaning(manifest):
        raise CheckpointError(f"{final}: there is another checkpoint already; it is not touched")
    try:
        return ConversionRecord.model_validate_json((final / RECORD).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{final / RECORD}: missing or damaged") from None


def _meaning(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says but for who wrote it, and where its ancestors lay: their sha256 says which they were."""
    return manifest.model_dump(exclude={"version": True, "lineage": {"__all__": {"path", "version"}}})


def _manifest(step: GrowthStep, source: Path, parent: Manifest, target: Target) -> Manifest:
    """The target's manifest: resharded as it is, or a new stage that goes on in the data where its parent stopped."""
    layout = {"layout": target.layout, "precision": target.precision, "version": megagrow.__version__}
    if not step.operators:
        return parent.model_copy(update=layout)
    ancestor = Ancestor(
        path=str(source),
        sha256=directory.fingerprint(source),
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
