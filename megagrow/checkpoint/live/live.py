"""Saves and loads a running Megatron-Core model, through `megatron.core.dist_checkpointing`.

The only part of this room that needs a process group. A checkpoint contains the model, the distributed optimizer in
its fully reshardable form (so that any layout can load it), the RNG states of every tensor and pipeline rank, and the
state that is not sharded. All ranks must call these functions together.
"""

import math
import pickle
import queue
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megagrow.checkpoint.formats.megatron_common import without_rates
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.live.bucket_repair import buckets_in_place
from megagrow.checkpoint.pickles import load_archive
from megagrow.checkpoint.tensors import tensor_kinds
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from megagrow.growth.values.grow import initial_values

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,  # without this the keys change where experts have an optimizer of their own
}
_FULL_DISK = 1 << 20
"""A disk with fewer free bytes than this counts as full: the failed save has filled the rest."""
_MAX_ROWS = 1 << 22
"""Number of values that `fill_fresh` generates at a time."""


class LiveCheckpoint:
    """Saves one model and its optimizer, synchronously or in the background, and loads them."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """Args:
        chunks: the model's chunks, unwrapped or in DDP.
        optimizer: Megatron-Core's optimizer.
        """
        self._chunks = [getattr(chunk, "module", chunk) for chunk in chunks]
        self._optimizer = optimizer
        self._background = AsyncCallsQueue()
        self._written = Path()

    def save(self, path: Path, common: Mapping[str, Any], finish: Callable[[], None], *, background: bool) -> None:
        """Write into the (empty) directory `path`, then call `finish` on every rank.

        Args:
            path: a staging directory that exists on every rank.
            common: the state that is not sharded.
            finish: publishes the checkpoint; with `background` it is called later, by `poll` or `wait`.
            background: write in forked processes while training continues.

        Raises:
            CheckpointError: a rank could not write.
        """
        state = self._state(is_loading=False)
        state["rng_state"] = _rng_object()
        state["optimizer"] = without_rates(state["optimizer"])
        state.update(common)
        self._written = path
        with _results_by_file(), _as_user_errors(path):
            request = dist_checkpointing.save(
                state, str(path), async_sharded_save=background, content_metadata=dict(METADATA)
            )
        if request is None:
            finish()
        else:
            request.add_finalize_fn(finish)
            self._background.schedule_async_request(request)

    def poll(self) -> None:
        """Finish the background saves that are written; CheckpointError if a rank could not write."""
        with _as_user_errors(self._written):
            self._background.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Finish all background saves; CheckpointError if a rank could not write."""
        with _as_user_errors(self._written):
            self._background.maybe_finalize_async_calls(blocking=True)

    def load(self, path: Path, *, optimizer: bool, rng: bool) -> dict[str, Any]:
        """Load the model, and optionally optimizer and RNG states; return the state that is not sharded.

        Args:
            path: a checkpoint that has passed `integrity.check` and `check_objects`.
            optimizer: load Adam's state too. Without it the optimizer begins anew, with the loaded weights as masters.
            rng: restore RNG states; only possible in the tensor and pipeline layout that saved them.

        Raises:
            CheckpointError: the checkpoint does not fit the model.
        """
        state = self._state(is_loading=True, optimizer=optimizer)
        own = _unsharded(state["optimizer"]) if optimizer else []
        if rng:
            state["rng_state"] = _rng_object()
        with _as_user_errors(path):
            loaded = dist_checkpointing.load(state, str(path))
        for name, chunk in self._named_chunks():
            chunk.load_state_dict(loaded.pop(name))
        if optimizer:
            with torch.no_grad():  # Megatron writes to fp32 parameters in place, and they are leaves
                self._optimizer.load_state_dict(_with_groups(loaded.pop("optimizer"), own))
        elif self._optimizer is not None:
            self._optimizer.reload_model_params()
        if rng:
            _set_rng(loaded.pop("rng_state"))
        common: dict[str, Any] = loaded
        return common

    def _named_chunks(self) -> list[tuple[str, Any]]:
        if len(self._chunks) == 1:
            return [("model", self._chunks[0])]
        return [(f"model{index}", chunk) for index, chunk in enumerate(self._chunks)]

    def _state(self, *, is_loading: bool, optimizer: bool = True) -> dict[str, Any]:
        # a copy: Megatron-Core adds its process groups to it, which must not survive into the next layout
        metadata = dict(METADATA)
        state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in self._named_chunks()}
        if optimizer:
            with buckets_in_place():
                state["optimizer"] = self._optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        return state


def _unsharded(optimizer: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return the unsharded part of each optimizer's state; with expert parallelism there are two optimizers."""
    parts = [optimizer] if "optimizer" in optimizer else [optimizer[index] for index in sorted(optimizer)]
    return [{key: value for key, value in part.items() if key != "param_state"} for part in parts]


def _with_groups(loaded: Mapping[Any, Any], own: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
    """Return a loaded state with the parameter groups of this layout's optimizers, at the saved step.

    The groups, and the number of optimizers that have them, depend on the expert-parallel size; everything else in a
    group is set at every step. So only the step is taken from the saved groups.
    """
    parts = [loaded, *(part for key, part in loaded.items() if isinstance(key, int))]
    saved = [group for part in parts for group in part.get("optimizer", {}).get("param_groups", ())]
    steps = [group["step"] for group in saved if "step" in group]
    states = []
    for index, part in enumerate(own):
        groups = [{**group, "step": steps[0]} if steps else group for group in part["optimizer"]["param_groups"]]
        sharded = (loaded if len(own) == 1 else loaded[index])["param_state"]
        states.append({**part, "optimizer": {"param_groups": groups}, "param_state": sharded})
    return states[0] if len(states) == 1 else dict(enumerate(states))


def fill_fresh(chunks: Sequence[Any], shape: ModelShape, seed: int) -> None:
    """Fill a model with initial weights that depend only on seed, tensor and global index, not on the layout."""
    by_key = {kind.key: kind for kind in tensor_kinds(shape)}
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=dict(METADATA))
        apply_factories(state)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor) and shard.data is not None:
                kind = by_key[shard.key]
                offset = shard.global_offset
                layer = offset[0] if kind.per_layer else None
                inner = kind.layer_shape(shape)
                _fill(
                    shard.data, offset[-len(inner) :], inner, kind.address(layer), kind.std(shape), kind.constant, seed
                )


def _fill(
    data: torch.Tensor, offset: Sequence[int], shape: Sequence[int], name: str, std: float, constant: float, seed: int
) -> None:
    """Fill one local shard that begins at `offset` of a tensor of `shape`, some rows at a time.

    The offset may have more dimensions than the shard, which then is at one index (an expert) of the first ones.
    """
    with torch.no_grad():
        if not std:
            data.fill_(constant)
            return
        before = len(shape) - data.dim()
        outer = np.ravel_multi_index(tuple(offset[:before]), tuple(shape[:before])) if before else 0
        first = int(outer) * math.prod(shape[before:-1]) + offset[before]
        columns = np.arange(data.shape[-1], dtype=np.uint64) + np.uint64(offset[-1])
        rows = max(1, _MAX_ROWS // data.shape[-1])
        for start in range(0, data.shape[0], rows):
            part = data[start : start + rows]
            index = (np.arange(part.shape[0], dtype=np.uint64) + np.uint64(first + start)) * np.uint64(shape[-1])
            values = initial_values(index[:, None] + columns[None, :], std=std, constant=0.0, name=name, seed=seed)
            part.copy_(torch.from_numpy(values))


def _rng_object() -> ShardedObject:
    """Return this rank's RNG states, with its coordinates in the (pipeline, tensor) grid, as Megatron stores them."""
    parallel = parallel_state
    coordinates = (parallel.get_pipeline_model_parallel_rank(), parallel.get_tensor_model_parallel_rank())
    grid = (parallel.get_pipeline_model_parallel_world_size(), parallel.get_tensor_model_parallel_world_size())
    state = {
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    replica = parallel.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", [state], grid, coordinates, replica_id=replica)


def _set_rng(state: Any) -> None:
    saved = state[0]
    torch.set_rng_state(saved["torch_rng_state"])
    torch.cuda.set_rng_state(saved["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["rng_tracker_states"])


class _Results:
    """Passes one value from the writing process to the training process; Megatron-Core uses it as a queue.

    The value is in an unnamed file that both have open. A pipe would not work: a background writer is joined before
    its value is fetched, and would block forever once the value is larger than the pipe.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()

    def put(self, value: Any) -> None:
        """Store the value; may be called once."""
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the value; queue.Empty if the writer died before it stored one."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # safe: this process's own child has just written it
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


@contextmanager
def _results_by_file() -> Iterator[None]:
    """While the block runs, let saves return their results through a file, not a server.

    Megatron-Core would spawn a manager process for that, which costs many seconds at the first save and outlives a
    trainer that is killed.
    """
    original = filesystem_async._get_write_results_queue
    filesystem_async._get_write_results_queue = _Results
    try:
        yield
    finally:
        filesystem_async._get_write_results_queue = original


@contextmanager
def _as_user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError:  # torch's message advises to load without any check
        raise CheckpointError(f"{path}: contains what Megatron-Core does not load") from None
    except (CheckpointException, OSError, RuntimeError, KeyError) as error:
        # CheckpointException is a BaseException that gathers the errors of all ranks
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error


def _reason(path: Path, error: BaseException) -> str:
    """Return the cause in one line; Megatron-Core's writers report a full disk as a broken archive."""
    free = shutil.disk_usage(path if path.exists() else path.parent).free
    if free < _FULL_DISK:
        return f"the disk is full ({free:,} bytes are left); earlier checkpoints are unchanged"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # in gathered tracebacks, the last line of the first one is the error itself
    message = next(
        (line for line in lines if re.match(r"^[A-Za-z_.]*(Error|Exception): ", line)), lines[0] if lines else ""
    )
    return f"{type(error).__name__}: {message[:300]}"


def check_objects(path: Path) -> frozenset[str]:
    """Return the keys of a checkpoint's objects, all of which Megatron-Core will unpickle.

    Raises:
        CheckpointError: one is damaged, or would import a name that is not allowed.
    """
    reader = TorchDistReader(path)
    load_archive(path / "common.pt", str(path / "common.pt"))
    for key in reader.objects:
        reader.read_object(key)
    return frozenset(reader.objects)
