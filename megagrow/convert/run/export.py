"""Write a checkpoint's weights in another format: Hugging Face's safetensors, or Megatron's older mp_rank files.

As with every conversion the target appears whole, by one rename, and a killed export goes on where it stopped. Adam's
state stays behind: neither format has a place for it that others would read.
"""

import errno
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.tensors import check_tensors, model_tensors
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan import Format, Order, Precision
from megagrow.convert.targets import PlannedTarget, plan_target
from megagrow.convert.work import (
    FINISH,
    Journal,
    Progress,
    RunOptions,
    allowed_piece_values,
    check_alone,
    check_made,
    check_unchanged,
    make_files,
    publish_target,
    wait,
    worker_rank,
)
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER

_POLL = 0.5
_SOME = 1 << 20


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        target: where it is.
        format: for people.
        bytes: of the weights' files.
        seconds: that it took.
        notes: what a person should know.
    """

    target: Path
    format: str
    bytes: int
    seconds: float
    notes: tuple[str, ...]


def order_export(
    source: Path, to: Format, precision: Precision, layout: ParallelLayout, shape: ModelShape, tokenizer: Path | None
) -> Order:
    """The order of an export."""
    return Order(
        source=source,
        to=to,
        small=shape,
        large=shape,
        growth=GrowthConfig(),
        layout=layout,
        precision=precision,
        optimizer=False,
        tokenizer=tokenizer,
    )


def export_checkpoint(
    order: Order, target: Path, how: RunOptions, progress: Progress = lambda done, total: None
) -> ExportResult:
    """Write a checkpoint's weights into `target`.

    Args:
        order: source, format, type and layout.
        target: for Hugging Face the directory itself; for the older Megatron format one of iterations.
        how: workers, memory, and what to do about what is there.
        progress: told (bytes written, bytes in all).

    Raises:
        CheckpointError: the format cannot express the shape, the source is not whole, or the target is there.
    """
    begun, here = time.time(), worker_rank()
    opened = open_checkpoint(order.source, shape=order.small, optimizer=False)
    check_tensors(model_tensors(opened.source.tensors), order.small, optimizer=False)
    production = plan_target(
        order, opened, lambda: _SOME
    )  # what cannot be expressed is refused before anything is written
    iteration = int(opened.common.get("iteration") or 0)
    final = iterations.iteration_path(target, iteration) if order.to == "legacy" else target
    done = ExportResult(
        final,
        order.to,
        sum(file.size for unit in production.units for file in unit),
        0.0,
        tuple(getattr(production, "notes", ())),
    )
    if final.exists() and not how.overwrite:
        raise CheckpointError(f"{final}: is there already; it is not touched (--overwrite replaces it)")
    check_alone(how, here, final)
    allowed_piece_values(how, here)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = iterations.conversion_staging(final)
    if how.restart:
        shutil.rmtree(staging, ignore_errors=True)
    try:
        make_files(order, opened, staging, final, how, here, progress)
        while not final.exists() or how.overwrite:
            journal = Journal(staging)
            with journal.alive():
                if journal.claim(FINISH):
                    check_unchanged(order, journal)
                    for told in journal.finished().values():
                        check_made(staging, told)
                    _finish(production, staging)
                    if journal.holds(FINISH):
                        publish_target(staging, final, replace=how.overwrite)
                        break
            wait(_POLL)
    except FileNotFoundError:
        if not final.exists() or (staging.is_dir() and here.count == 1):
            raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if here.count > 1:  # the others may be at work in there
            raise CheckpointError(f"{final.parent}: the disk is full; make room, and give it again") from None
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(f"{final.parent}: the disk is full; nothing of the export is kept") from None
    if order.to == "legacy" and not (target / TRACKER).is_file():
        iterations.write_tracker(target, iteration)
    return ExportResult(done.target, done.format, done.bytes, time.time() - begun, (*opened.notes, *done.notes))


def _finish(production: PlannedTarget, staging: Path) -> None:
    """Write the small files."""
    finish = getattr(production, "finish", None)
    assert finish is not None, type(production)
    finish(staging)
