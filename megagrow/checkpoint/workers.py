"""Several processes at one conversion: on this machine, or one a rank of `torchrun` or `srun` over many.

They share nothing but the staging directory. Each plans the same work from the order in the journal, so no plan is
sent around, and takes units until none is left. The memory that is allowed is shared evenly; what is left of a share
beside the programs themselves decides how large pieces are, and nothing else.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from megagrow.checkpoint.convert import import_torch, model_tensors
from megagrow.checkpoint.crew import TORCH
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.journal import Journal
from megagrow.checkpoint.order import DTYPES, Order
from megagrow.checkpoint.production import work
from megagrow.checkpoint.rows import PIECE_VALUES, is_copy
from megagrow.checkpoint.store import Opened, Production
from megagrow.checkpoint.torch_dist_write import TorchDistProduction
from megagrow.errors import CheckpointError

DEFAULT_MEMORY = 1 << 30
_FIXED = 40 << 20
"""Bytes beside a worker's pieces: file buffers, hashes, the plan, and imports that are still to come."""
_WORKER_BYTES = 280 << 20
"""Of a worker that has imported all that it needs, and made nothing yet."""
_BYTES_A_VALUE = 32
"""Bytes that a worker needs at most for each value of a piece: read, gathered, grown, cast and cut."""
_MIN_VALUES = 1 << 16


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    rank: int = 0
    count: int = 1
    on_node: int = 1


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun or srun gave this process; the only one where neither did."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        count = int(environment["WORLD_SIZE"])
        return Place(int(environment["RANK"]), count, int(environment.get("LOCAL_WORLD_SIZE", count)))
    # a batch script's own shell has SLURM_PROCID too; tasks are counted by the step that they are in
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        per_node = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        count = int(environment["SLURM_STEP_NUM_TASKS"])
        return Place(int(environment["SLURM_PROCID"]), count, max(map(int, per_node), default=count))
    return Place()


def piece_values(memory: int, workers: int) -> int:
    """Values of a piece, so that some workers together stay within `memory` bytes.

    Raises:
        CheckpointError: the programs alone need more.
    """
    own = int(psutil.Process().memory_info().rss)
    base = own + (workers - 1) * min(own, _WORKER_BYTES)  # a worker imports less than a process that does other things
    values = ((memory - base) // workers - _FIXED) // _BYTES_A_VALUE
    if values < _MIN_VALUES:
        need = base + (_FIXED + _MIN_VALUES * _BYTES_A_VALUE) * workers
        raise CheckpointError(
            f"--memory {memory / 2**20:,.0f}MiB is too little for {workers} workers, which need "
            f"{need / 2**20:,.0f}MiB with all that they import; give more, or fewer workers"
        )
    return min(values, PIECE_VALUES)


def planned(order: Order, opened: Opened, values: Callable[[], int]) -> Production:
    """The production that an order asks for.

    Args:
        order: what is asked for.
        opened: its source.
        values: of a piece; asked once all is imported that the production needs, since that takes memory too.
    """
    source, dtype = opened.source, DTYPES[order.precision]
    if order.to == "huggingface":
        from megagrow.checkpoint.huggingface.read import remembered_of
        from megagrow.checkpoint.huggingface.write import HuggingFaceExport

        if any(info.dtype != dtype for info in model_tensors(source.tensors).values()):
            import_torch()
        return HuggingFaceExport(
            source,
            order.large,
            dtype,
            remembered=remembered_of(opened.common),
            tokenizer=order.tokenizer,
            piece_bytes=values() * dtype.itemsize,
        )
    if order.to == "legacy":
        from megagrow.checkpoint.legacy_write import LegacyExport

        import_torch()
        return LegacyExport(source, order.large, order.layout, dtype, opened.common, values() * dtype.itemsize)
    conversion = order.conversion(source)
    if not is_copy(conversion, source):
        import_torch()
    return TorchDistProduction(conversion, source, values())


def take_part(order: Order, production: Production, staging: Path, journal: Journal, place: Place) -> None:
    """Make units of a conversion until all are made, in this process."""
    with _one_thread():
        first = len(production.units) * place.rank // place.count
        work(production, staging, journal, sha256=order.sha256, first=first)


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
        production = planned(order, opened, lambda: piece_values(told["memory"], workers))
        take_part(order, production, staging, journal, Place(number, workers))
    except FileNotFoundError:
        if staging.is_dir():
            raise  # else others were quicker: all is done and published
    except CheckpointError:
        sys.exit(CheckpointError.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(CheckpointError.exit_code)


if __name__ == "__main__":
    main()
