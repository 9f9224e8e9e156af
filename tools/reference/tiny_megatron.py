"""A tiny model on real ranks, for tools that compare checkpoints: Megatron-Core trains it, saves it and loads it.

The samples of a step are random and depend on their number alone, so every layout sees the same; and a step tells the
loss and the gradient norm unrounded, so two states that differ in one bit hardly ever say the same.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megagrow.checkpoint.directory import Manifest, integrity, write_manifest
from megagrow.checkpoint.index import Box
from megagrow.config import ModelShape, ParallelLayout, Stage

STEPS, SAMPLES, LEARNING_RATE = 3, 8, 3e-3
Losses = tuple[tuple[float, float], ...]
"""Loss and gradient norm of each step."""


class Model:
    """A tiny model on this rank in a layout: saved, loaded and trained by Megatron-Core."""

    def __init__(self, shape: ModelShape, layout: ParallelLayout, fresh: bool = False) -> None:
        from megagrow import runtime
        from megagrow.checkpoint.live.live import LiveCheckpoint, fill_fresh
        from megagrow.training.engine import Engine

        self._shape, self._layout = shape, layout
        # 32 ranks on two cores that others use as well may wait long for each other
        self.ranks = runtime.start(**layout.groups, seed=11, timeout_minutes=60)
        few = layout.data_parallel_size * layout.pipeline_model_parallel_size
        batch = {"micro_batch_size": SAMPLES // few, "global_batch_size": SAMPLES}
        stage = Stage(name="pairs", model=shape, parallel=layout, batch=batch, precision="fp32", train_tokens=1000)
        self._engine = Engine(stage, self.ranks, partial(fill_fresh, shape=shape, seed=3) if fresh else None)
        self._live = LiveCheckpoint(self._engine.chunks, self._engine.optimizer)

    def train(self, before: int) -> Losses:
        """Take some steps after so many."""
        taken = [
            self._engine.step(self._sample, (before + step) * SAMPLES, LEARNING_RATE, stop=False)
            for step in range(STEPS)
        ]
        return tuple((step.loss, step.grad_norm) for step in taken)

    def load(self, path: Path) -> None:
        """Load with Megatron-Core, which reshards."""
        self._live.load(path, optimizer=True, rng=False)

    def save(self, path: Path) -> None:
        """Save with Megatron-Core, and say what it is."""
        if self.ranks.is_main:
            path.mkdir(parents=True)
        torch.distributed.barrier()
        common = {"iteration": STEPS, "checkpoint_version": 3.0}
        self._live.save(path, common, partial(self._finish, path), background=False)

    def needs(self) -> Iterator[tuple[str, Box]]:
        """Each part of a tensor that this rank has to load."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

        state = self._live._state(is_loading=True)
        apply_factories(state)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor):
                lengths = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
                yield shard.key, tuple((at, at + n) for at, n in zip(shard.global_offset, lengths, strict=True))

    def _sample(self, index: int) -> dict[str, torch.Tensor]:
        length = self._shape.seq_length
        words = torch.randint(0, self._shape.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(index))
        return {"tokens": words[:-1], "labels": words[1:], "position_ids": torch.arange(length)}

    def _finish(self, path: Path) -> None:
        if self.ranks.is_main:
            manifest = Manifest(
                family="pairs", stage="pairs", iteration=STEPS, shape=self._shape, layout=self._layout,
                precision="fp32", position={}, consumed_samples=0, consumed_tokens=0, flops=0.0,
            )  # fmt: skip
            write_manifest(path, manifest)
            integrity.seal(path)
        torch.distributed.barrier()
