"""Several processes at one conversion: each takes every n-th task and writes files of its own.

Workers share nothing but the directories. Each plans the same conversion from the same source, so no plan is sent
around, and what a task gives does not depend on who does it or when: the result is the same values for any number.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megagrow.checkpoint.convert import Conversion, execute, plan_conversion
from megagrow.checkpoint.torch_dist import Reader, Writer, Written
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.growth.step import plan_growth


@dataclass(frozen=True)
class Order:
    """All that a worker needs to make its part of a conversion."""

    source: Path
    staging: Path
    small: ModelShape
    large: ModelShape
    growth: GrowthConfig
    layout: ParallelLayout
    weight_dtype: torch.dtype
    seed: int


def plan_order(order: Order, reader: Reader) -> Conversion:
    """The conversion that an order asks for."""
    step = plan_growth(order.small, order.large, order.growth, order.seed)
    return plan_conversion(reader.tensors, step, order.layout, order.weight_dtype)


def execute_order(
    order: Order, reader: Reader, writer: Writer, workers: int, progress: Callable[[int, int], None]
) -> Conversion:
    """Carry an order out with some workers, this process being the only one if it is one; return the conversion."""
    conversion = plan_order(order, reader)
    total = len(conversion.tasks)
    if workers == 1:
        execute(conversion, reader, writer, lambda done: progress(done, total))
        return conversion
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's threads may hang
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        parts: list[Future[Written]] = [pool.submit(_work, order, place, workers) for place in range(workers)]
        wait(parts, return_when=FIRST_EXCEPTION)
        for place, part in enumerate(parts, start=1):
            writer.absorb(part.result())
            progress(total * place // workers, total)
    return conversion


def _work(order: Order, place: int, workers: int) -> Written:
    """One worker's tasks: every `workers`-th, from `place` on."""
    torch.set_num_threads(1)
    reader = Reader(order.source)
    conversion = plan_order(order, reader)
    mine = replace(conversion, tasks=conversion.tasks[place::workers])
    writer = Writer(order.staging, part=place + 1)
    execute(mine, reader, writer, objects=place == 0)
    return writer.written()
