"""What can never succeed is refused before it is queued, in one line that says what would do.

Each check asks one thing of the family, of the disk or of the cluster. They cost milliseconds on a login node; what
they let pass may wait in a queue for days.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.errors import CheckpointError, LaunchError
from megagrow.launch import slurm
from megagrow.launch.graph import Job
from megagrow.launch.resources import Resources, check_memory, cluster_of, resources
from megagrow.launch.slurm import Partition
from megagrow.tracker import TRACKER


def check_family(family: Family, jobs: Sequence[Job]) -> None:
    """Refuse layouts that do not fill nodes, too little memory, and a directory that nothing can go on from."""
    for job in jobs:
        resources(family, job)
        check_memory(family, job)
    _check_save(family.save)
    for index in range(len(family.stages)):
        _check_tracker(FamilyPaths(family).stage(index).checkpoints)


def check_cluster(family: Family, jobs: Sequence[Job]) -> None:
    """Refuse what the cluster's partitions cannot hold, and a container that is not there; asks Slurm."""
    _check_image(family)
    known = slurm.partitions()
    default = ",".join(partition.name for partition in known.values() if partition.is_default)
    for job in jobs:
        asked = resources(family, job)
        named = asked.partition or default
        if not named:
            raise LaunchError(f"{job.name}: no partition is the default here: name one in cluster.partition")
        for name in named.split(","):
            if name not in known:
                there = ", ".join(sorted(known))
                raise LaunchError(f"{job.name}: no partition {name!r} on this cluster: there are {there}")
        _check_size(job, asked, [known[name] for name in named.split(",")])


def _check_size(job: Job, asked: Resources, partitions: Sequence[Partition]) -> None:
    """Refuse a job that none of the partitions that it may run in could ever hold; one alone must."""
    names = ",".join(partition.name for partition in partitions)
    fitting = [partition for partition in partitions if partition.gpus is None or partition.gpus >= asked.gpus_per_node]
    if not fitting:
        most = max(partition.gpus or 0 for partition in partitions)
        raise LaunchError(
            f"{job.name}: asks for {asked.gpus_per_node} GPUs a node, and a node of {names!r} has at most {most} that "
            "Slurm knows of: change cluster.gpus_per_node or the partition"
        )
    longest = max(fitting, key=lambda partition: slurm.seconds(partition.time))
    if slurm.seconds(asked.time) > slurm.seconds(longest.time):
        raise LaunchError(
            f"{job.name}: asks for {asked.time}, and partition {longest.name!r} allows {longest.time}: it would wait "
            "for ever; say a shorter time, an unfinished job starts again by itself"
        )
    most = max(partition.nodes for partition in fitting)
    if (asked.nodes or 1) > most:
        raise LaunchError(
            f"{job.name}: {job.title} needs {asked.nodes} nodes of {asked.ranks_per_node} ranks, partition {names!r} "
            f"has {most}: choose smaller parallel sizes, or another partition"
        )


def _check_image(family: Family) -> None:
    container = cluster_of(family).container
    is_file = container.image is not None and (
        container.image.startswith(("/", ".")) or container.image.endswith(".sif")
    )
    if is_file and container.image is not None and not Path(container.image).exists():
        raise LaunchError(f"cluster.container.image {container.image} does not exist: correct its path")


def _check_save(save: Path) -> None:
    """Refuse a directory that cannot be written; it is not made here."""
    existing = next(place for place in (save, *save.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise LaunchError(f"save {save}: {existing} is a file: choose another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise LaunchError(f"save {save}: {existing} cannot be written by you: choose another directory")


def _check_tracker(checkpoints: Path) -> None:
    """Refuse iterations without a tracker, as training will: nothing is trained over by mistake."""
    if not checkpoints.is_dir() or (checkpoints / TRACKER).is_file():
        return
    found = sorted(path.name for path in checkpoints.glob("iter_*") if path.name.removeprefix("iter_").isdecimal())
    if found:
        raise CheckpointError(
            f"{checkpoints}: has {found[-1]} but no {TRACKER}: write the iteration to go on from into it, or move "
            "the directory away"
        )
