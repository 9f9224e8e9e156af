"""Processes that share one conversion: workers on this machine, or ranks of `torchrun` or `srun` over many machines.

They share only the staging directory. Each plans the same work from the order in the journal, so no plan is
transferred, and makes units until none is left. The allowed memory is shared evenly. The part of a share that the
programs themselves do not need determines how large pieces are, and nothing else.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow import log
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.convert.early import IMPORT_TORCH
from megagrow.convert.make import import_torch
from megagrow.convert.plan import Order
from megagrow.convert.targets import PlannedTarget, plan_target
from megagrow.convert.work.disk import is_disk_full
from megagrow.convert.work.journal import Journal
from megagrow.convert.work.memory import piece_values
from megagrow.convert.work.rank import WorkerRank
from megagrow.convert.work.unit import make_units
from megagrow.errors import CheckpointError


def take_part(order: Order, target: PlannedTarget, staging: Path, journal: Journal, rank: WorkerRank) -> None:
    """Make units of a conversion in this process until all are done."""
    with _one_thread():
        first = len(target.units) * rank.rank // rank.count
        make_units(target, staging, journal, sha256=order.sha256, first=first)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch, if it is imported, compute in one thread: parallelism comes from the workers."""
    if (torch := sys.modules.get("torch")) is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Run a worker of a `WorkerPool`: standard input specifies what to import, then what to do.

    A unit that fails is released. The process that started this one meets the same error and reports it.
    """
    log.setup()
    line = sys.stdin.readline()
    if line == IMPORT_TORCH:
        import_torch()
        line = sys.stdin.readline()
    if not line:  # there is no work
        return
    work = json.loads(line)
    staging, number, workers = Path(work["staging"]), work["number"], work["workers"]
    journal = Journal(staging)
    try:
        order, options = Order.model_validate(journal.plan()["order"]), work["options"]
        opened = open_checkpoint(
            order.source,
            shape=order.small,
            optimizer=order.optimizer,
            ignored_arguments=order.ignored_arguments,
            checksums=options["checksums"],
        )
        allowed = options["allow_non_finite"]
        target = plan_target(order, opened, lambda: piece_values(work["memory"], workers), allowed)
        take_part(order, target, staging, journal, WorkerRank(number, workers))
    except FileNotFoundError:
        if staging.is_dir():
            raise  # otherwise others were faster: everything is done and published
    except CheckpointError:
        sys.exit(CheckpointError.exit_code)
    except OSError as error:
        if not is_disk_full(error):
            raise
        sys.exit(CheckpointError.exit_code)
