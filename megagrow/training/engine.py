"""The engine: Megatron-Core's model, distributed optimizer and pipeline schedules behind two verbs.

`step` takes a global batch to new weights, `evaluate` takes samples to a loss. Which samples is decided by their
index alone, so the same global batch is seen whatever the layout: micro-batch m of data rank r holds the samples
m * (micro * ranks) + r * micro and on. Losses are means over samples, reduced in float64 over all ranks at once. That
comes before the optimizer: a step that is not finite on any rank is taken on none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megagrow.config import Schedule, Stage
from megagrow.model.gpt import build_model
from megagrow.runtime.process import Ranks

Sample = dict[str, Tensor]
GetSample = Callable[[int], Sample]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean, in nats per token.
        grad_norm: before clipping.
        finite: loss and norm were, on every rank; if not, weights and moments are as they were.
        stop: whether a rank wants to stop.
    """

    loss: float
    grad_norm: float
    finite: bool
    stop: bool


class Engine:
    """A stage's model and optimizer on this rank.

    Attributes:
        chunks: the model's chunks on this rank, wrapped for data parallelism.
        optimizer: Megatron-Core's distributed optimizer.
    """

    def __init__(self, stage: Stage, ranks: Ranks, fill: Callable[[Sequence[Any]], None] | None) -> None:
        """Build model and optimizer.

        Args:
            stage: shape, layout, batch, precision.
            ranks: this rank's place.
            fill: gives the bare chunks their initial weights; None: a checkpoint will be loaded over them.
        """
        self._stage, self._ranks = stage, ranks
        chunks = build_model(
            stage.model, stage.parallel, precision=stage.precision, recompute=stage.recompute_granularity
        )
        if fill is None:
            _zero(chunks)
        else:
            fill(chunks)
        self._config = chunks[0].config
        distributed = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        )
        self.chunks = [
            DistributedDataParallel(self._config, distributed, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        self.optimizer = get_megatron_optimizer(_optimizer_config(stage), self.chunks)
        if fill is not None:
            self._zero_moments()
        self._config.finalize_model_grads_func = finalize_model_grads
        self._config.grad_scale_func = self.optimizer.scale_loss
        self._forward_backward = get_forward_backward_func()

    def step(self, get: GetSample, first: int, learning_rate: float, *, stop: bool) -> StepResult:
        """Take one optimizer step, unless its loss or gradient norm is not finite.

        Args:
            get: sample by index.
            first: index of the global batch's first sample.
            learning_rate: of this step.
            stop: whether this rank was asked to stop; the result says whether any was.
        """
        batch, layout = self._stage.batch, self._stage.parallel
        count = batch.global_batch_size // (batch.micro_batch_size * layout.data_parallel_size)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        _set_rates(self.optimizer, learning_rate, self._stage.schedule)
        losses = self._run(get, range(first, first + batch.global_batch_size), count, forward_only=False)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        mine = sum(float(loss.double().sum()) for loss in losses)
        total, wishes, faults = self._reduce(mine, float(stop), float(not math.isfinite(norm)))
        finite = math.isfinite(total) and not faults
        if finite:
            self._descend(norm)
        return StepResult(total / batch.global_batch_size, norm, finite, wishes > 0)

    def evaluate(self, samples: Sequence[Sample]) -> float:
        """Return the mean loss of samples in nats per token, each counted once whatever the layout."""
        micro, layout = self._stage.batch.micro_batch_size, self._stage.parallel
        block = micro * layout.data_parallel_size
        count = -(-len(samples) // block)
        if layout.virtual_pipeline_model_parallel_size:
            count = -(-count // layout.pipeline_model_parallel_size) * layout.pipeline_model_parallel_size
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            padded = range(count * block)
            losses = self._run(lambda i: samples[i % len(samples)], padded, count, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        mine = [index for m in range(count) for index in self._indices(padded, m)]
        counted = zip((loss for part in losses for loss in part), mine, strict=False)
        (total,) = self._reduce(sum(float(loss.double()) for loss, index in counted if index < len(samples)))
        return total / len(samples)

    def _parts(self) -> Sequence[Any]:
        """The optimizers: with experts there may be two, and one may have no parameters on this rank."""
        found: Sequence[Any] = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return found

    def _zero_moments(self) -> None:
        """Give Adam the state that it would make at its first step: a stage may be saved before it has taken one."""
        for part in self._parts():
            if part.get_parameters():
                part.init_state_fn(part.optimizer, part.config)
                for group in part.optimizer.param_groups:
                    group["step"] = 0

    def _descend(self, norm: float) -> None:
        """Clip the prepared gradients and let Adam take them: what is left of Megatron-Core's `optimizer.step`."""
        clip = self._stage.schedule.clip_grad
        for part in self._parts():
            parameters = part.get_parameters()
            if clip and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
        self.optimizer.step_with_ready_grads()

    def _run(self, get: GetSample, block: range, count: int, *, forward_only: bool) -> list[Tensor]:
        """Run the schedule over a global batch; return on the last stage each micro-batch's losses, one a sample."""
        stage = self._stage
        iterators = [self._micro_batches(get, block, count) for _ in self.chunks]
        results = self._forward_backward(
            forward_step_func=partial(_forward_step, context=stage.parallel.context_parallel_size),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=count,
            seq_length=stage.model.seq_length,
            micro_batch_size=stage.batch.micro_batch_size,
            forward_only=forward_only,
        )
        return [result["losses"] for result in results]

    def _micro_batches(self, get: GetSample, block: range, count: int) -> Iterator[Sample]:
        for m in range(count):
            samples = [get(index) for index in self._indices(block, m)] if self._ranks.needs_data else []
            keys = ("tokens", "labels", "position_ids")
            yield {
                key: torch.stack([sample[key] for sample in samples]).to(self._ranks.device) for key in keys if samples
            }

    def _indices(self, block: range, m: int) -> range:
        """Samples of this data rank's m-th micro-batch."""
        micro = self._stage.batch.micro_batch_size
        start = m * micro * self._ranks.data_size + self._ranks.data_rank * micro
        return block[start : start + micro]

    def _reduce(self, loss: float, *flags: float) -> list[float]:
        """Sum losses over the ranks that computed them, and flags over all."""
        ranks = self._ranks
        replicas = ranks.tensor_size * ranks.context_size
        sums = torch.tensor([loss / replicas, *flags], dtype=torch.float64, device=ranks.device)
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found


def _forward_step(
    batches: Iterator[Sample], chunk: Any, *, context: int
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """Megatron-Core's forward step: losses [b, s] on the last stage, activations elsewhere."""
    batch = next(batches)
    if context > 1 and batch:
        batch = get_batch_on_this_cp_rank(batch)
    output = chunk(batch.get("tokens"), batch.get("position_ids"), None, labels=batch.get("labels"))
    return output, _mean_loss


def _mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to descend on, and each sample's own for the record."""
    return losses.mean(), {"losses": losses.detach().float().mean(dim=1)}


def _optimizer_config(stage: Stage) -> OptimizerConfig:
    schedule = stage.schedule
    half = stage.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=1.0,  # set at every step
        weight_decay=schedule.weight_decay,
        adam_beta1=schedule.adam_beta1,
        adam_beta2=schedule.adam_beta2,
        adam_eps=schedule.adam_eps,
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=True,
        clip_grad=schedule.clip_grad,
    )


def _set_rates(optimizer: Any, learning_rate: float, schedule: Schedule) -> None:
    """Set what changes from step to step; groups carry their own multipliers (no decay on norms and biases)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = schedule.weight_decay * group.get("wd_mult", 1.0)


def _zero(chunks: Sequence[Any]) -> None:
    """Replace the builder's NaN: a checkpoint comes over it, and Megatron-Core may read before that."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
