"""Several processes at one conversion: on this machine, or one a rank of `torchrun` or `srun` over many.

They share nothing but the staging directory. Each plans the same work from the order in the journal, so no plan is
sent around, and takes units until none is left. The memory that is allowed is shared evenly; what is left of a share
beside the programs themselves decides how large pieces are, and nothing else.
"""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagrow.checkpoint.formats import open_checkpoint
from megagrow.convert.early import TORCH
from megagrow.convert.make import import_torch
from megagrow.convert.plan import Order
from megagrow.convert.targets import PlannedTarget, plan_target
from megagrow.convert.work.journal import Journal
from megagrow.convert.work.memory import piece_values
from megagrow.convert.work.place import WorkerRank
from megagrow.convert.work.unit import make_units
from megagrow.errors import CheckpointError


def take_part(order: Order, production: PlannedTarget, staging: Path, journal: Journal, place: WorkerRank) -> None:
    """Make units of a conversion until all are made, in this process."""
    with _one_thread():
        first = len(production.units) * place.rank // place.count
        make_units(production, staging, journal, sha256=order.sha256, first=first)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch, where a production has imported it, compute in one thread: the workers are the threads."""
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
    """A worker of a `Crew`: standard input says what to import, and then what to do.

    What it cannot do it gives back; the process that started it will meet the same error, and tells it.
    """
    word = sys.stdin.readline()
    if word == TORCH:
        import_torch()
        word = sys.stdin.readline()
    if not word:  # there was nothing to do
        return
    told = json.loads(word)
    staging, number, workers = Path(told["staging"]), told["number"], told["workers"]
    journal = Journal(staging)
    try:
        order = Order.model_validate(journal.plan()["order"])
        opened = open_checkpoint(order.source, shape=order.small, optimizer=order.optimizer)
        production = plan_target(order, opened, lambda: piece_values(told["memory"], workers))
        take_part(order, production, staging, journal, WorkerRank(number, workers))
    except FileNotFoundError:
        if staging.is_dir():
            raise  # else others were quicker: all is done and published
    except CheckpointError:
        sys.exit(CheckpointError.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(CheckpointError.exit_code)
