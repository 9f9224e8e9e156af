"""`srun megagrow train`, one task a rank and no torchrun: Slurm's variables say what torchrun's would.

A rank reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, whoever set them. Here they
are worked out from those of a job step. Nothing is changed where a launcher has set them, nor outside of a step of
several tasks: a batch script has Slurm's variables too, and is no rank.
"""

import os
import re
import zlib
from collections.abc import Mapping

from megagrow.errors import LaunchError

_TASKS = "SLURM_STEP_NUM_TASKS"
_PORTS = range(20000, 30000)


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for this task of a job step; empty where there is nothing to add.

    Raises:
        LaunchError: a step of several tasks whose variables make no sense.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment or environment.get(_TASKS, "1") == "1":
        return {}
    world, rank, local = (_number(environment, name) for name in (_TASKS, "SLURM_PROCID", "SLURM_LOCALID"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    here, port = _tasks_here(environment), _PORTS[zlib.crc32(f"{job}.{step}".encode()) % len(_PORTS)]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        **({} if here is None else {"LOCAL_WORLD_SIZE": str(here)}),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        # the same for all tasks of a step, and hardly ever that of another step on the node
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def adopt() -> bool:
    """Put this task's `place` into the environment; return whether there was one."""
    found = place(os.environ)
    os.environ.update(found)
    return bool(found)


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: `n3` of `n[3-5,7],login1`, `a01-x` of `a[01-12]-x`, `r1n04` of `r[1-2]n[04-9]`.

    Raises:
        LaunchError: it is no such list.
    """
    hosts = r"(?:[A-Za-z0-9_.-]|\[\d[0-9,-]*\])+"
    if not re.fullmatch(rf"{hosts}(,{hosts})*", nodes):
        raise LaunchError(f"SLURM_STEP_NODELIST={nodes!r} names no host: start the ranks with srun, or with torchrun")
    first = re.match(hosts, nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[0-9,-]*\]", r"\1", first[0])


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """Tasks on this node, from a list like `4(x2),3`; None where Slurm does not say."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise LaunchError(f"{name}={text!r} in a job step of {environment[_TASKS]} tasks: start the ranks with srun")
    return int(text)
