"""The resources that a job requests from a cluster: pure arithmetic on a validated `Family`.

The number of nodes follows from one rule: the ranks of a layout fill whole nodes. Everything else is looked up in the
cluster section, most specific setting first. Every job but training is one task on one node; a conversion may be
several tasks, which Slurm places on any nodes.
"""

from dataclasses import dataclass

from megagrow.config import Family, Stage
from megagrow.config.cluster import Cluster, JobResources
from megagrow.errors import LaunchError
from megagrow.launch.graph import Job
from megagrow.plan import count_parameters

_GB = 1e9
_SLURM_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Resources:
    """A job's request. `nodes` None: as many as its `tasks` need; `ranks_per_node`: processes started by torchrun."""

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
    """The cluster section of a family; LaunchError if it has none."""
    if family.cluster is None:
        raise LaunchError(
            f"family {family.name!r} has no `cluster` section: set at least cluster.gpus_per_node and "
            "cluster.partition, or build the family on this machine with `megagrow run`"
        )
    return family.cluster


def job_resources(family: Family, job: Job) -> Resources:
    """Return what a job requests; LaunchError if its ranks do not fill whole nodes."""
    cluster = cluster_of(family)
    layers: list[JobResources] = [cluster]
    nodes, tasks, ranks, gpus = 1, 1, 1, 0
    if job.kind == "train":
        assert job.stage is not None
        nodes, ranks = _nodes_and_ranks(family.stages[job.stage], cluster)
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
    """Reject a stage whose weights, gradients and optimizer alone exceed the memory specified in the family.yaml."""
    if job.kind != "train" or job.stage is None:
        return
    cluster, stage, request = cluster_of(family), family.stages[job.stage], job_resources(family, job)
    needed = bytes_per_rank(stage)
    if request.gpus_per_node:
        available, limit = (cluster.memory_per_gpu or 0) * _GB, "cluster.memory_per_gpu"
        ranks_per_gpu = -(-request.ranks_per_node // request.gpus_per_node)
        needed *= ranks_per_gpu
    else:
        available, limit = _memory_bytes(request.memory), "the memory of a node"
        needed *= request.ranks_per_node
    if available and needed > available:
        raise LaunchError(
            f"stage {stage.name!r}: weights, gradients and optimizer need {needed / _GB:.1f} GB, but {limit} is "
            f"{available / _GB:.1f} GB, and activations need memory too: raise its tensor_model_parallel_size, "
            f"pipeline_model_parallel_size or data_parallel_size (now {stage.parallel.describe()})"
        )


def bytes_per_rank(stage: Stage) -> float:
    """Bytes of weights, fp32 gradients and Adam's state on the rank that holds the most, without activations.

    Masters and moments (12 bytes per parameter) are sharded over the ranks that read different data, as in
    Megatron-Core's distributed optimizer. The first and the last pipeline rank hold an embedding besides their layers.
    """
    count, layout = count_parameters(stage.model), stage.parallel
    mlp = count.mlp / layout.expert_model_parallel_size
    mlp *= layout.tensor_model_parallel_size / layout.expert_tensor  # all is divided by the dense size below
    layers = count.total - count.embeddings - count.mlp + mlp
    tables = max(count.word_embeddings + count.position_embeddings, count.output_layer)
    if layout.pipeline_model_parallel_size == 1:
        tables = count.embeddings
    held = [0] * layout.pipeline_model_parallel_size
    for number, chunk in enumerate(layout.layers_of_chunks(stage.model.num_layers)):
        held[number % len(held)] += len(chunk)
    parameters = (layers * max(held) / stage.model.num_layers + tables) / layout.tensor_model_parallel_size
    weights, masters = (2, 12) if stage.precision == "bf16" else (4, 8)
    return parameters * (weights + 4 + masters / (layout.data_parallel_size * layout.context_parallel_size))


def _nodes_and_ranks(stage: Stage, cluster: Cluster) -> tuple[int, int]:
    """The number of nodes that train a stage, and the ranks on each."""
    per_node, world = cluster.ranks_per_node or cluster.gpus_per_node or 1, stage.parallel.world_size
    if world <= per_node:
        return 1, world
    if world % per_node:
        fits = world // per_node * per_node
        raise LaunchError(
            f"stage {stage.name!r}: {world} ranks ({stage.parallel.describe()}) do not fill nodes of {per_node}: "
            f"choose parallel sizes whose product is {fits} or {fits + per_node}, or another cluster.ranks_per_node"
        )
    return world // per_node, per_node


def _first(layers: list[JobResources], name: str) -> str | None:
    """The first value that is set, from the most specific layer on."""
    values: list[str | None] = [getattr(layer, name) for layer in layers]
    return next((value for value in values if value is not None), None)


def _memory_bytes(memory: str | None) -> float:
    """Bytes of a value of --mem, in megabytes if it has no unit; 0 if there is no value or it asks for all memory."""
    if memory is None:
        return 0.0
    number, unit = (memory[:-1], memory[-1]) if memory[-1] in _SLURM_UNITS else (memory, "M")
    return float(number) * _SLURM_UNITS[unit]
