"""Checks before a launch: what can never succeed is rejected before it is queued, with one line that names a fix.

Each check looks at one property of the family, the disk or the cluster. The checks take milliseconds on a login node;
a job that they let through may wait in a queue for days.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import CheckpointError, LaunchError
from megagrow.launch import slurm
from megagrow.launch.graph import Job
from megagrow.launch.resources import Resources, check_memory, cluster_of, job_resources
from megagrow.launch.slurm import Partition
from megagrow.tracker import TRACKER


def check_family(family: Family, jobs: Sequence[Job]) -> None:
    """Reject layouts that do not fill nodes, too little memory, and save directories that no job could use."""
    for job in jobs:
        job_resources(family, job)
        check_memory(family, job)
    _check_save(family.save)
    for index in range(len(family.stages)):
        _check_tracker(FamilyPaths(family).stage(index).checkpoints)


def check_cluster(family: Family, jobs: Sequence[Job]) -> None:
    """Reject jobs that no partition can run, and a container image that does not exist; queries Slurm."""
    _check_image(family)
    partitions = slurm.partitions()
    default = ",".join(partition.name for partition in partitions.values() if partition.is_default)
    for job in jobs:
        request = job_resources(family, job)
        names = request.partition or default
        if not names:
            raise LaunchError(f"{job.name}: this cluster has no default partition: set cluster.partition")
        for name in names.split(","):
            if name not in partitions:
                known = ", ".join(sorted(partitions))
                raise LaunchError(f"{job.name}: no partition {name!r} on this cluster: choose from {known}")
        _check_size(job, request, [partitions[name] for name in names.split(",")])


def _check_size(job: Job, request: Resources, partitions: Sequence[Partition]) -> None:
    """Reject a job that exceeds every partition it may run in."""
    names = ",".join(partition.name for partition in partitions)
    fitting = [
        partition for partition in partitions if partition.gpus is None or partition.gpus >= request.gpus_per_node
    ]
    if not fitting:
        most = max(partition.gpus or 0 for partition in partitions)
        raise LaunchError(
            f"{job.name}: requests {request.gpus_per_node} GPUs per node, but Slurm knows of at most {most} in a node "
            f"of {names!r}: change cluster.gpus_per_node or the partition"
        )
    longest = max(fitting, key=lambda partition: slurm.parse_time_limit(partition.time))
    if slurm.parse_time_limit(request.time) > slurm.parse_time_limit(longest.time):
        raise LaunchError(
            f"{job.name}: requests {request.time}, but partition {longest.name!r} allows {longest.time}, so it would "
            "wait forever: set a shorter time; a job that does not finish in time is started again automatically"
        )
    most = max(partition.nodes for partition in fitting)
    if (request.nodes or 1) > most:
        raise LaunchError(
            f"{job.name}: {job.title} needs {request.nodes} nodes of {request.ranks_per_node} ranks, but partition "
            f"{names!r} has {most}: choose smaller parallel sizes or another partition"
        )


def _check_image(family: Family) -> None:
    image = cluster_of(family).container.image
    is_file = image is not None and (image.startswith(("/", ".")) or image.endswith(".sif"))
    if is_file and image is not None and not Path(image).exists():
        raise LaunchError(f"cluster.container.image {image} does not exist: correct the path")


def _check_save(save: Path) -> None:
    """Reject a save directory that cannot be written; this does not create it."""
    existing = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise LaunchError(f"save {save}: {existing} is a file: choose another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LaunchError(f"save {save}: you have no permission to write {existing}: choose another directory")


def _check_tracker(checkpoints: Path) -> None:
    """Reject iterations without a tracker, as training does: nothing is overwritten by mistake."""
    if not checkpoints.is_dir() or (checkpoints / TRACKER).is_file():
        return
    found = sorted(path.name for path in checkpoints.glob("iter_*") if path.name.removeprefix("iter_").isdecimal())
    if len(found) > 1:  # a single one is what a kill before the first tracker leaves, and training takes it
        raise CheckpointError(
            f"{checkpoints}: has {found[-1]} but no {TRACKER}: write the iteration to resume from into that file, or "
            "move the directory away"
        )
