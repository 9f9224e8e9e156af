"""What a job asks of a cluster, and whether that can hold it: pure arithmetic on a checked `Family`.

One rule gives the nodes: the ranks of a layout, cut into nodes that are all full. Everything else is looked up in
the cluster section, the most specific place first. Other jobs than training are one task on one node; a conversion
may be several tasks, which Slurm lays where it likes.
"""

from dataclasses import dataclass

from megagrow.config import Family, Stage
from megagrow.config.cluster import Cluster, JobResources
from megagrow.errors import LaunchError
from megagrow.launch.graph import Job
from megagrow.plan import count_parameters

_GB = 1e9
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Resources:
    """A job's demands. `nodes` None: as many as its `tasks` take; `ranks_per_node` are torchrun's processes."""

    nodes: int | None
    tasks: int
    ranks_per_node: int
    gpus_per_node: int
    account: str | None
    partition: str | None
    qos: str | None
    time: str
    cpus_per_task: int | None
    memory: str | None
    extra: tuple[str, ...]


def cluster_of(family: Family) -> Cluster:
    """The cluster section of a family; LaunchError where there is none."""
    if family.cluster is None:
        raise LaunchError(
            f"family {family.name!r} has no `cluster` section: say at least cluster.gpus_per_node and "
            "cluster.partition, or build it on this machine with `megagrow run`"
        )
    return family.cluster


def resources(family: Family, job: Job) -> Resources:
    """Return what a job asks for; LaunchError where its ranks do not fill whole nodes."""
    cluster = cluster_of(family)
    layers: list[JobResources] = [cluster]
    nodes, tasks, ranks, gpus = 1, 1, 1, 0
    if job.kind == "train":
        assert job.stage is not None
        nodes, ranks = _nodes(family.stages[job.stage], cluster)
        tasks = nodes
        gpus = min(ranks, cluster.gpus_per_node)
    else:
        layers.insert(0, cluster.without_gpu)
    several = job.kind == "convert" and cluster.convert_tasks > 1
    if job.kind in cluster.jobs:
        layers.insert(0, cluster.jobs[job.kind])
    if job.kind == "train" and job.stage is not None:
        layers.insert(0, family.stages[job.stage].cluster)
    return Resources(
        nodes=None if several else nodes,
        tasks=cluster.convert_tasks if several else tasks,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        account=_first(layers, "account"),
        partition=_first(layers, "partition"),
        qos=_first(layers, "qos"),
        time=_first(layers, "time") or cluster.time,
        cpus_per_task=next((layer.cpus_per_task for layer in layers if layer.cpus_per_task), None),
        memory=_first(layers, "memory"),
        extra=tuple(option for layer in reversed(layers) for option in layer.sbatch_extra),
    )


def check_memory(family: Family, job: Job) -> None:
    """Refuse a stage whose weights, gradients and optimizer alone are more than the memory that was named."""
    if job.kind != "train" or job.stage is None:
        return
    cluster, stage, asked = cluster_of(family), family.stages[job.stage], resources(family, job)
    needed = bytes_a_rank(stage)
    if asked.gpus_per_node:
        available, where = (cluster.memory_per_gpu or 0) * _GB, "cluster.memory_per_gpu"
        ranks_a_gpu = -(-asked.ranks_per_node // asked.gpus_per_node)
        needed *= ranks_a_gpu
    else:
        available, where = _bytes(asked.memory), "the memory of a node"
        needed *= asked.ranks_per_node
    if available and needed > available:
        raise LaunchError(
            f"stage {stage.name!r}: weights, gradients and optimizer need {needed / _GB:.1f} GB, {where} is "
            f"{available / _GB:.1f} GB, and activations come on top: raise its tensor_model_parallel_size, "
            f"pipeline_model_parallel_size or data_parallel_size ({stage.parallel.describe()} now)"
        )


def bytes_a_rank(stage: Stage) -> float:
    """Bytes of weights, fp32 gradients and Adam's state on the fullest rank, without activations.

    Masters and moments (12 bytes a parameter) are cut over the ranks that see different data, as Megatron-Core's
    distributed optimizer does. The first and the last pipeline rank hold an embedding besides their layers.
    """
    count, layout = count_parameters(stage.model), stage.parallel
    mlp = count.mlp / layout.expert_model_parallel_size
    layers = count.total - count.embeddings - count.mlp + mlp
    tables = max(count.word_embeddings + count.position_embeddings, count.output_layer)
    if layout.pipeline_model_parallel_size == 1:
        tables = count.embeddings
    parameters = (layers / layout.pipeline_model_parallel_size + tables) / layout.tensor_model_parallel_size
    weights, masters = (2, 12) if stage.precision == "bf16" else (4, 8)
    return parameters * (weights + 4 + masters / (layout.data_parallel_size * layout.context_parallel_size))


def _nodes(stage: Stage, cluster: Cluster) -> tuple[int, int]:
    """Nodes of a stage's training and ranks of each."""
    full, world = cluster.ranks_per_node or cluster.gpus_per_node or 1, stage.parallel.world_size
    if world <= full:
        return 1, world
    if world % full:
        whole = world // full * full
        raise LaunchError(
            f"stage {stage.name!r}: {world} ranks ({stage.parallel.describe()}) do not fill nodes of {full}: choose "
            f"parallel sizes whose product is {whole} or {whole + full}, or another cluster.ranks_per_node"
        )
    return world // full, full


def _first(layers: list[JobResources], name: str) -> str | None:
    values: list[str | None] = [getattr(layer, name) for layer in layers]
    return next((value for value in values if value is not None), None)


def _bytes(memory: str | None) -> float:
    """Bytes of what --mem has; without a unit they are megabytes; 0 where nothing or everything was asked."""
    if memory is None:
        return 0.0
    number, unit = (memory[:-1], memory[-1]) if memory[-1] in _UNITS else (memory, "M")
    return float(number) * _UNITS[unit]
