"""Megatron-Core's model, distributed optimizer and pipeline schedules behind two methods, `step` and `evaluate`.

`step` updates the weights from a global batch, `evaluate` computes the loss of samples. Samples are selected by index
alone, so the global batch is the same in every layout: micro-batch m of data rank r starts at sample
m * (micro * ranks) + r * micro. Losses are means over samples, reduced in float64 over all ranks at once. That
reduction comes before the optimizer: a step that is not finite on any rank is skipped on all of them.
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
from megagrow.data.stream import Sample
from megagrow.model.gpt import build_model
from megagrow.runtime.process import Ranks

GetSample = Callable[[int], Sample]
MicroBatch = dict[str, Tensor]
"""The tensors of a micro-batch's samples, stacked: [b, s]; empty on ranks that need no data."""


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Attributes:
        loss: mean loss in nats per token.
        grad_norm: gradient norm before clipping.
        finite: whether loss and norm were finite on every rank; if not, weights and moments are unchanged.
        stop: whether any rank requested a stop.
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
            ranks: this rank's position in the process groups.
            fill: sets the initial weights of the bare chunks; None where a checkpoint will be loaded.
        """
        self._stage, self._ranks = stage, ranks
        chunks = build_model(
            stage.model, stage.parallel, precision=stage.precision, recompute=stage.recompute_granularity
        )
        if fill is None:
            _fill_with_zeros(chunks)
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
            get: returns a sample by its index.
            first: index of the global batch's first sample.
            learning_rate: learning rate of this step.
            stop: whether this rank was asked to stop; the result reports whether any rank was.
        """
        batch, layout = self._stage.batch, self._stage.parallel
        count = batch.global_batch_size // (batch.micro_batch_size * layout.data_parallel_size)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        _set_rates(self.optimizer, learning_rate, self._stage.schedule)
        block = range(first, first + batch.global_batch_size)
        losses = self._run_schedule(get, block, count, self._stage.model.seq_length, forward_only=False)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        local_loss = sum(float(loss.double().sum()) for loss in losses)
        total, stops, faults = self._reduce(local_loss, float(stop), float(not math.isfinite(norm)))
        finite = math.isfinite(total) and not faults
        if finite:
            self._apply_gradients(norm)
        return StepResult(total / batch.global_batch_size, norm, finite, stops > 0)

    def evaluate(self, samples: Sequence[Sample]) -> float:
        """Return the mean loss of samples in nats per token, counting each sample once in every layout."""
        micro, layout = self._stage.batch.micro_batch_size, self._stage.parallel
        block = micro * layout.data_parallel_size
        count = -(-len(samples) // block)
        if layout.virtual_pipeline_model_parallel_size:
            count = -(-count // layout.pipeline_model_parallel_size) * layout.pipeline_model_parallel_size
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            padded = range(count * block)
            length = len(samples[0]["tokens"])  # of the family's first stage: this one's may be another
            losses = self._run_schedule(lambda i: samples[i % len(samples)], padded, count, length, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        indices = [index for m in range(count) for index in self._indices(padded, m)]
        indexed = zip((loss for micro_batch in losses for loss in micro_batch), indices, strict=False)
        (total,) = self._reduce(sum(float(loss.double()) for loss, index in indexed if index < len(samples)))
        return total / len(samples)

    def _optimizers(self) -> Sequence[Any]:
        """The optimizers in the chain: with experts there may be two, and one may have no parameters on this rank."""
        optimizers: Sequence[Any] = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return optimizers

    def _zero_moments(self) -> None:
        """Create the Adam state that the first step would create: a stage may be saved before its first step."""
        for part in self._optimizers():
            if part.get_parameters():
                part.init_state_fn(part.optimizer, part.config)
                for group in part.optimizer.param_groups:
                    group["step"] = 0

    def _apply_gradients(self, norm: float) -> None:
        """Clip the prepared gradients and run Adam: the remaining half of Megatron-Core's `optimizer.step`."""
        clip = self._stage.schedule.clip_grad
        for part in self._optimizers():
            parameters = part.get_parameters()
            if clip and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip, total_norm=norm)
        self.optimizer.step_with_ready_grads()

    def _run_schedule(
        self, get: GetSample, block: range, count: int, seq_length: int, *, forward_only: bool
    ) -> list[Tensor]:
        """Run the schedule; on the last pipeline stage return each micro-batch's losses by sample."""
        stage = self._stage
        iterators = [self._micro_batches(get, block, count) for _ in self.chunks]
        results = self._forward_backward(
            forward_step_func=partial(_forward_step, context=stage.parallel.context_parallel_size),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=count,
            seq_length=seq_length,
            micro_batch_size=stage.batch.micro_batch_size,
            forward_only=forward_only,
        )
        return [result["losses"] for result in results]

    def _micro_batches(self, get: GetSample, block: range, count: int) -> Iterator[MicroBatch]:
        for m in range(count):
            samples = [get(index) for index in self._indices(block, m)] if self._ranks.needs_data else []
            keys = ("tokens", "labels", "position_ids")
            yield {
                key: torch.stack([sample[key] for sample in samples]).to(self._ranks.device) for key in keys if samples
            }

    def _indices(self, block: range, m: int) -> range:
        """Sample indices of this data rank's m-th micro-batch."""
        micro = self._stage.batch.micro_batch_size
        start = m * micro * self._ranks.data_size + self._ranks.data_rank * micro
        return block[start : start + micro]

    def _reduce(self, loss: float, *flags: float) -> list[float]:
        """Sum losses over the ranks that computed them, and flags over all ranks."""
        ranks = self._ranks
        replicas = ranks.tensor_size * ranks.context_size
        sums = torch.tensor([loss / replicas, *flags], dtype=torch.float64, device=ranks.device)
        dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals


def _forward_step(
    batches: Iterator[MicroBatch], chunk: Any, *, context: int
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """Megatron-Core's forward step: losses [b, s] on the last pipeline stage, activations elsewhere."""
    batch = next(batches)
    if context > 1 and batch:
        batch = get_batch_on_this_cp_rank(batch)
    output = chunk(batch.get("tokens"), batch.get("position_ids"), None, labels=batch.get("labels"))
    return output, _mean_loss


def _mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimize, and the loss of each sample for the record."""
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
    """Set learning rate and weight decay; groups carry their own multipliers (no decay on norms and biases)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = schedule.weight_decay * group.get("wd_mult", 1.0)


def _fill_with_zeros(chunks: Sequence[Any]) -> None:
    """Replace the builder's NaN: a checkpoint overwrites the zeros, but Megatron-Core may read weights before that."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
