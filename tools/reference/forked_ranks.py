"""Many ranks of Megatron-Core at once, forked from one process that has imported it: 32 of them start in a second.

Importing Megatron-Core takes ten seconds of a core, so two cores cannot start many ranks the usual way. A process that
has imported it, but has neither started a thread nor joined a group, can be forked as often as one likes; the ranks
share its memory. Each leaves its result in a pipe. When one fails, all end; when the parent dies, they die with it.
"""

import gc
import logging
import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from megagrow.parent_death import die_with_parent

PATIENCE_S = 3600.0
"""Seconds that ranks have for all they do; on a machine that others use too it may be many."""


class RankFailed(AssertionError):
    """A forked process failed; its traceback is the message."""


def prepare() -> None:
    """Import once for all ranks what takes long; nothing of it starts a thread or joins a group."""
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    from megagrow.checkpoint.live import live
    from megagrow.runtime import adam, cpu
    from megagrow.training import engine

    assert live and engine
    cpu.install()
    adam.install()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Megatron-Core collects at every load, and what was imported is a third of a second to go through


def forked(works: Sequence[Callable[[], Any]], patience: float | None = None) -> list[Any]:
    """Do each work in a process of its own, all at once; RankFailed, with its traceback, as soon as one fails, or when
    so many seconds have passed.
    """
    context = multiprocessing.get_context("fork")
    children, results = [], [None] * len(works)
    waiting: dict[Any, int] = {}
    try:
        for index, work in enumerate(works):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(work, sender, os.getpid()))
            child.start()
            sender.close()  # before the next fork, or a dead child's end would stay open in its siblings
            children.append(child)
            waiting[receiver] = index
        deadline = None if patience is None else time.monotonic() + patience
        while waiting:
            ready = wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailed(f"processes {sorted(waiting.values())} are not done after {patience:g} s")
            for done in ready:
                index = waiting.pop(done)
                results[index] = _received(done, index)
    finally:
        for child in children:
            if waiting:
                child.kill()
            child.join()
    return results


def _received(receiver: Any, index: int) -> Any:
    try:
        good, value = receiver.recv()
    except EOFError:
        raise RankFailed(f"process {index} died") from None
    if not good:
        raise RankFailed(f"process {index}:\n{value}")
    return value


def _child(work: Callable[[], Any], sender: Connection, parent: int) -> None:
    die_with_parent(parent)
    try:
        sender.send((True, work()))
    except BaseException:  # Megatron-Core's checkpoint errors are no Exceptions
        sender.send((False, traceback.format_exc()))


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return forked([partial(_rank, rank, world, port, work, arguments) for rank in range(world)], PATIENCE_S)


def _rank(rank: int, world: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from megagrow import runtime

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return work(*arguments)
    finally:
        runtime.stop()
