"""From a published checkpoint to the first one of the next stage: check, plan, convert, describe, publish.

The target does not exist before its last rename; a conversion that fails or is killed leaves a staging directory
that the next one sweeps away, and the source is only ever read.
"""

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import megagrow
from megagrow.checkpoint import directory
from megagrow.checkpoint.convert import Conversion, execute, grown_common, plan_conversion
from megagrow.checkpoint.manifest import Ancestor, Manifest, read_manifest, write_manifest
from megagrow.checkpoint.novelty import write_novelty
from megagrow.checkpoint.torch_dist import Reader, Writer
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.errors import CheckpointError
from megagrow.growth.step import GrowthStep, plan_growth
from megagrow.records import ConversionRecord

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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionRecord:
    """Grow and reshard a checkpoint into `save`'s iteration 0, and point its tracker there.

    Args:
        source: an iteration directory.
        save: directory of the next stage's checkpoints.
        target: what it shall become.
        contents: compare the source's checksums first.
        progress: told (tasks done, tasks in all).

    Raises:
        CheckpointError: the source is not whole, is not of its shape, or the target is there already.
        GrowthError: an operator cannot do the step.
    """
    begun = time.time()
    directory.check(source, contents=contents)
    final = directory.iteration_path(save, 0)
    if final.exists():
        raise CheckpointError(f"{final}: there is a checkpoint already; it is not touched")
    parent = read_manifest(source)
    step = plan_growth(parent.shape, target.shape, target.growth, target.seed)
    reader = Reader(source)
    try:
        conversion = plan_conversion(reader.tensors, step, target.layout, _DTYPES[target.precision])
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    save.mkdir(parents=True, exist_ok=True)
    directory.sweep(save)
    staging = directory.stage(final)
    try:
        written = _write(conversion, reader, staging, source, parent, target, progress)
        directory.publish(staging, final)
        directory.write_tracker(save, 0)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{save}: the disk is full; nothing of the new checkpoint is kept") from None
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return ConversionRecord(
        time=time.time(),
        source=str(source),
        target=str(final),
        operators=step.operators,
        moments=step.moments.value,
        exact=step.exact,
        tensors=len(conversion.tasks),
        bytes_read=conversion.bytes_read,
        bytes_written=written,
        seconds=time.time() - begun,
    )


def _write(
    conversion: Conversion,
    reader: Reader,
    staging: Path,
    source: Path,
    parent: Manifest,
    target: Target,
    progress: Callable[[int, int], None],
) -> int:
    """Write the whole target into `staging`; return the bytes of its tensors."""
    writer = Writer(staging)
    total = len(conversion.tasks)
    execute(conversion, reader, writer, lambda done: progress(done, total))
    write_manifest(staging, _manifest(conversion.step, source, parent, target))
    write_novelty(staging, conversion.step)
    writer.finish(grown_common(reader.common(), conversion.step))
    directory.seal(staging)
    return writer.bytes_written


def _manifest(step: GrowthStep, source: Path, parent: Manifest, target: Target) -> Manifest:
    """The target's manifest: a new stage at iteration 0 that goes on in the data where its parent stopped."""
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
        seed=step.seed,
        exact=step.exact,
        version=megagrow.__version__,
    )
    return parent.model_copy(
        update={
            "stage": target.stage,
            "iteration": 0,
            "shape": target.shape,
            "layout": target.layout,
            "precision": target.precision,
            "flops": 0.0,
            "lineage": (*parent.lineage, ancestor),
            "version": megagrow.__version__,
        }
    )
