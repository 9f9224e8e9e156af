"""Starts and stops one rank: joins the job, creates the process groups, seeds, and cleans up.

Everything that depends on the number of processes is decided here, once, and returned as a frozen `Ranks`. `torchrun`
or `slurm.adopt` sets the environment; without it, a process is a world of size 1, with no port and no server. Sizes
are plain ints under Megatron's names, so this room does not depend on family.yaml.
"""

import contextlib
import os
import random
import re
from dataclasses import dataclass
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from megagrow import log
from megagrow.errors import LaunchError, NodeError
from megagrow.runtime import adam, cpu

_log = log.get("runtime")


@dataclass(frozen=True)
class Ranks:
    """This process's rank in every group, the size of every group, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int

    def describe(self) -> str:
        """The number of ranks, how they are laid out, and the device, for people."""
        count = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        layout = f"TP{self.tensor_size} PP{self.pipeline_size} CP{self.context_size} DP{self.data_size}"
        if self.device.type == "cuda":
            return f"{count} ({layout}), each on a GPU ({torch.cuda.get_device_name(self.device)})"
        return f"{count} ({layout}) on CPU, threads of each: {torch.get_num_threads()}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which acts for the whole job."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding: it is on the first pipeline stage."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss: it is on the last pipeline stage."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def needs_data(self) -> bool:
        """Whether this rank reads samples: the first pipeline stage for tokens, the last for labels."""
        return self.is_first_stage or self.is_last_stage


def start(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    data_parallel_size: int | None = None,
    seed: int = 1234,
    timeout_minutes: float = 10.0,
) -> Ranks:
    """Join the job, create its groups and seed; LaunchError if the number of processes does not match the layout.

    With `data_parallel_size` None it follows from the world size. A collective that takes longer than
    `timeout_minutes` fails. After `reset`, another layout may be started in the same processes.
    """
    global_rank, world_size, local_rank = (
        log.number_in_environment(name, default) for name, default in _RANK_VARIABLES
    )
    if global_rank >= world_size:
        raise LaunchError(f"RANK {global_rank} with WORLD_SIZE {world_size}: ranks are numbered from 0")
    model_size = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    _check_world(world_size, model_size, data_parallel_size)
    cpu.install()
    adam.install()
    device = _choose_device(local_rank)
    if not dist.is_initialized():
        _join(global_rank, world_size, device, timedelta(minutes=timeout_minutes))

    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    ranks = Ranks(
        rank=global_rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_model_parallel_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline_model_parallel_size,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context_parallel_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=world_size // model_size,
    )
    _seed_everything(seed, ranks)
    _log.debug("%s", ranks)
    return ranks


def reset() -> None:
    """Destroy the groups and the RNG tracker, but stay in the job: `start` may follow with another layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as tracker
    from megatron.core.transformer.moe import moe_utils

    parallel_state.destroy_model_parallel()
    # Megatron-Core collects load-balancing losses in a list whose length is the first model's number of layers.
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    # Megatron-Core seeds its tracker once per process; a second `start` must get a fresh tracker.
    tracker._CUDA_RNG_STATE_TRACKER = None
    tracker._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def stop() -> None:
    """Leave the job; harmless if it was never joined or is broken."""
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):
        reset()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's rank as set by its launcher, known before it joins the job."""
    return log.number_in_environment("RANK", 0)


def describe_lost_rank(error: RuntimeError) -> str | None:
    """Return a collective's message about a rank that died or does not answer; None for any other error."""
    text = str(error).strip()
    if not isinstance(error, dist.DistError) and "third_party/gloo" not in text:
        return None
    line = text.splitlines()[0] if text else type(error).__name__
    # gloo's message starts with a position in its sources and ends with advice
    return re.sub(r"^\[[^\]]*\] ", "", line).partition(". This is")[0]


_RANK_VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
# Set by Slurm for a step or job with GPUs, and by schedulers, containers and users that hand out some of them.
_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
_NO_GPUS = {"", "-1", "NoDevFiles", "none", "void"}


def _check_world(world_size: int, model_size: int, data_size: int | None) -> None:
    needed = model_size * (data_size or max(1, world_size // model_size))
    if world_size != needed:
        data = "" if data_size is None else f" x data {data_size}"
        raise LaunchError(
            f"{world_size} process(es), but tensor x pipeline x context = {model_size}{data} needs {needed}: "
            f"start them with `torchrun --nproc-per-node {needed} ...` or change the stage's parallel sizes"
        )


def _choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        _refuse_lost_gpus()
        share = max(1, _cores() // max(1, log.number_in_environment("LOCAL_WORLD_SIZE", 1)))
        torch.set_num_threads(log.number_in_environment("OMP_NUM_THREADS", share) or share)
        return torch.device("cpu")
    # Megatron-Core's overlap of communication and computation relies on kernels running in launch order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if local_rank >= torch.cuda.device_count():
        raise NodeError(
            f"LOCAL_RANK {local_rank}, but this node has {torch.cuda.device_count()} CUDA device(s): "
            "start no more processes on a node than it has devices"
        )
    torch.cuda.set_device(local_rank)
    # Autotuned cuDNN picks kernels by timing, so two runs would differ. Matmul precision stays at torch's default.
    torch.backends.cudnn.benchmark = False
    return torch.device("cuda", local_rank)


def _refuse_lost_gpus() -> None:
    """Raise NodeError if this job asked for GPUs: a training on CPU would run for hours before anyone noticed.

    An empty CUDA_VISIBLE_DEVICES, or -1, asks for the CPU whatever else is set.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in _NO_GPUS:
        return
    for name in _GPU_VARIABLES:
        value = os.environ.get(name, "")
        if value not in _NO_GPUS and (name, value) != ("SLURM_GPUS_ON_NODE", "0"):
            raise NodeError(
                f"this job asked for GPUs ({name}={value}), but torch {torch.__version__} sees none: check the driver "
                "and torch's build (`python -c 'import torch; torch.cuda.init()'`), or set CUDA_VISIBLE_DEVICES to an "
                "empty value to use the CPU"
            )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _join(rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # A store in this process's memory needs no port, which another job might be using, and no address, which may
        # be left in the shell from another job: a connection to it would wait for its timeout.
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but torch does not export it explicitly
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LaunchError(f"WORLD_SIZE is {world_size}, but {name} is not set: start the ranks with torchrun")
    if not 0 < log.number_in_environment("MASTER_PORT", 0) < 2**16:
        raise LaunchError(f"environment variable MASTER_PORT={os.environ['MASTER_PORT']!r} is no port (1 to 65535)")
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, device_id=bound)


def _seed_everything(seed: int, ranks: Ranks) -> None:
    """Seed as Megatron does: pipeline stages differ by 100, tensor ranks in the tracker, data ranks not at all."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    own_seed = seed + 100 * ranks.pipeline_rank
    random.seed(own_seed)
    numpy.random.seed(own_seed % 2**32)
    torch.manual_seed(own_seed)
    model_parallel_cuda_manual_seed(own_seed)
