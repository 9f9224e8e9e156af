"""The rank of this process among the workers of a conversion that torchrun or srun started."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerRank:
    """This process among those that were started together."""

    rank: int = 0
    count: int = 1
    on_node: int = 1


def worker_rank(environment: Mapping[str, str] = os.environ) -> WorkerRank:
    """The place that torchrun or srun gave this process; the only one where neither did."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        count = int(environment["WORLD_SIZE"])
        return WorkerRank(int(environment["RANK"]), count, int(environment.get("LOCAL_WORLD_SIZE", count)))
    # a batch script's own shell has SLURM_PROCID too; tasks are counted by the step that they are in
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        per_node = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        count = int(environment["SLURM_STEP_NUM_TASKS"])
        return WorkerRank(int(environment["SLURM_PROCID"]), count, max(map(int, per_node), default=count))
    return WorkerRank()
