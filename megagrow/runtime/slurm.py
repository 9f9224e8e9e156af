"""Derives torchrun's variables from Slurm's, for `srun megagrow train`: one task per rank, no torchrun.

A rank reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from its environment. This
module computes them from the variables of a job step. Nothing is changed where a launcher has set them, or outside a
step of several tasks: a batch script also has Slurm's variables, but is not a rank.
"""

import os
import re
import zlib
from collections.abc import Mapping

from megagrow import slurm_step
from megagrow.errors import LaunchError

_PORTS = range(20000, 30000)


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for this task of a job step; empty where there is nothing to add.

    Raises:
        LaunchError: a step of several tasks whose variables are missing or malformed.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment or not slurm_step.has_several_tasks(environment):
        return {}
    names = (slurm_step.TASK_COUNT, slurm_step.TASK_ID, slurm_step.LOCAL_TASK_ID)
    world, rank, local = (_number(environment, name) for name in names)
    local_size = _tasks_on_this_node(environment)
    port = _PORTS[zlib.crc32(slurm_step.step_id(environment).encode()) % len(_PORTS)]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        **({} if local_size is None else {"LOCAL_WORLD_SIZE": str(local_size)}),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(slurm_step.node_list(environment)),
        # the same for all tasks of a step, and rarely that of another step on the node
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def set_torchrun_variables() -> bool:
    """Add this task's `torchrun_variables` to the environment; return whether there were any."""
    variables = torchrun_variables(os.environ)
    os.environ.update(variables)
    return bool(variables)


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list of nodes.

    Examples: `n3` of `n[3-5,7],login1`, `a01-x` of `a[01-12]-x`, `r1n04` of `r[1-2]n[04-9]`.

    Raises:
        LaunchError: `nodes` is not such a list.
    """
    hosts = r"(?:[A-Za-z0-9_.-]|\[\d[0-9,-]*\])+"
    if not re.fullmatch(rf"{hosts}(,{hosts})*", nodes):
        raise LaunchError(
            f"{slurm_step.NODE_LIST}={nodes!r} contains no host name: start the ranks with srun, or with torchrun"
        )
    first = re.match(hosts, nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[0-9,-]*\]", r"\1", first[0])


def _tasks_on_this_node(environment: Mapping[str, str]) -> int | None:
    """Return the number of tasks on this node; None where Slurm does not provide it."""
    counts, node = slurm_step.tasks_per_node(environment), slurm_step.node_index(environment)
    return counts[node] if node is not None and node < len(counts) else None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise LaunchError(
            f"{name}={text!r} in a job step of {environment[slurm_step.TASK_COUNT]} tasks: start the ranks with srun"
        )
    return int(text)
