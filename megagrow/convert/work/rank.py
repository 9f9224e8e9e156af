"""The rank of this process among those that torchrun or srun started for a conversion."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megagrow import slurm_step


@dataclass(frozen=True)
class WorkerRank:
    """This process among those that were started together."""

    rank: int = 0
    count: int = 1
    on_node: int = 1


def worker_rank(environment: Mapping[str, str] = os.environ) -> WorkerRank:
    """The rank that torchrun or srun gave this process; the default, a single process, if neither started it."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        count = int(environment["WORLD_SIZE"])
        return WorkerRank(int(environment["RANK"]), count, int(environment.get("LOCAL_WORLD_SIZE", count)))
    if slurm_step.TASK_ID in environment and slurm_step.has_several_tasks(environment):
        count = int(environment[slurm_step.TASK_COUNT])
        on_node = max(slurm_step.tasks_per_node(environment), default=count)
        return WorkerRank(int(environment[slurm_step.TASK_ID]), count, on_node)
    return WorkerRank()
