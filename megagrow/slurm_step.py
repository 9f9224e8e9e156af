"""The job step that a process runs in, as Slurm's variables describe it. No other file knows their names.

A batch script has most of these variables too and is no task, so tasks are counted by the step that they are in.
"""

import os
import re
from collections.abc import Mapping

TASKS = "SLURM_STEP_NUM_TASKS"
"""Number of tasks of the step; a rank's launcher removes it for the processes that it starts."""
TASK = "SLURM_PROCID"
LOCAL_TASK = "SLURM_LOCALID"
NODES = "SLURM_STEP_NODELIST"
END_OF_JOB = "SLURM_JOB_END_TIME"
"""Seconds since the epoch."""


def has_several_tasks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks of a step."""
    return environment.get(TASKS, "1") != "1"


def tasks_per_node(environment: Mapping[str, str] = os.environ) -> list[int]:
    """Tasks on each node of the step, from a list like `4(x2),3`; empty where Slurm does not give one."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    return counts


def node(environment: Mapping[str, str] = os.environ) -> int | None:
    """This node's number within the step."""
    text = environment.get("SLURM_NODEID", "0")
    return int(text) if text.isdecimal() else None


def nodes(environment: Mapping[str, str] = os.environ) -> str:
    """Slurm's list of the step's nodes (or, without one, of the job's), as `n[3-5,7]`."""
    return environment.get(NODES) or environment.get("SLURM_JOB_NODELIST", "")


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The number of the job."""
    return environment.get("SLURM_JOB_ID")


def step_id(environment: Mapping[str, str] = os.environ) -> str:
    """Job and step, the same text for all tasks of a step and another for any other step."""
    return f"{environment.get('SLURM_JOB_ID', '0')}.{environment.get('SLURM_STEP_ID', '0')}"
