"""The job step that a process runs in, read from Slurm's environment variables. Only this file knows their names.

Most of these variables are also set in a batch script, which is not a task of a step. Tasks are therefore counted
with the variables of the step, not with those of the job.
"""

import os
import re
from collections.abc import Mapping

TASK_COUNT = "SLURM_STEP_NUM_TASKS"
"""The number of tasks in the step; a rank's launcher removes it from the environment of the processes it starts."""
TASK_ID = "SLURM_PROCID"
LOCAL_TASK_ID = "SLURM_LOCALID"
NODE_LIST = "SLURM_STEP_NODELIST"
JOB_END_TIME = "SLURM_JOB_END_TIME"
"""Seconds since the epoch."""


def has_several_tasks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks of a step."""
    return environment.get(TASK_COUNT, "1") != "1"


def tasks_per_node(environment: Mapping[str, str] = os.environ) -> list[int]:
    """The number of tasks on each node of the step, from a list like `4(x2),3`; empty if Slurm gives no list."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    return counts


def node_index(environment: Mapping[str, str] = os.environ) -> int | None:
    """This node's number within the step; None if Slurm's variable is not a number."""
    text = environment.get("SLURM_NODEID", "0")
    return int(text) if text.isdecimal() else None


def node_list(environment: Mapping[str, str] = os.environ) -> str:
    """Slurm's list of the step's nodes, as `n[3-5,7]`; without a step, of the job's nodes."""
    return environment.get(NODE_LIST) or environment.get("SLURM_JOB_NODELIST", "")


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job's number; None outside a job."""
    return environment.get("SLURM_JOB_ID")


def step_id(environment: Mapping[str, str] = os.environ) -> str:
    """Job and step: the same text for all tasks of a step, a different one for every other step."""
    return f"{environment.get('SLURM_JOB_ID', '0')}.{environment.get('SLURM_STEP_ID', '0')}"
