"""A training step in thirty lines, for tests that compare layouts: Megatron-Core's own parts, nothing of training/.

Every layout starts from the same whole weights and sees the same samples, so losses and gradient norms must agree.
"""

from dataclasses import dataclass, field
from typing import Any

STEPS, MICRO_BATCHES, MICRO_BATCH = 3, 4, 2


@dataclass(frozen=True)
class Case:
    """A model in a layout, by the keyword arguments of `ModelShape`, `ParallelLayout` and `build_model`."""

    name: str
    shape: dict[str, Any]
    layout: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)


def run_cases(cases: list[Case]) -> dict[str, list[tuple[float, float]]]:
    """Case name -> (loss, gradient norm) of each step, the same on every rank."""
    from megagrow import runtime

    out = {}
    for case in cases:
        out[case.name] = _run(case)
        runtime.reset()
    return out


def sample(shape: Any, index: int) -> Any:
    """Micro-batch number `index`: tokens [b, s + 1]."""
    import torch

    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(0, shape.vocab_size, (MICRO_BATCH, shape.seq_length + 1), generator=generator)


def _run(case: Case) -> list[tuple[float, float]]:
    import torch
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megagrow import runtime
    from megagrow.config import ModelShape, ParallelLayout

    shape, layout = ModelShape(**case.shape), ParallelLayout(**case.layout)
    ranks = runtime.start(**layout.groups, seed=11)
    models, optimizer = _prepare(shape, layout, case.build)
    positions = torch.arange(shape.seq_length)[None]

    def forward_step(batches: Any, model: Any) -> Any:
        tokens = next(batches)
        losses = model(tokens[:, :-1], positions.expand(len(tokens), -1), None, labels=tokens[:, 1:].contiguous())
        return losses, lambda out: (out.mean(), {"loss": out.detach().float().mean()})

    seen = []
    for step in range(STEPS):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        mine = range(ranks.data_rank, MICRO_BATCHES, ranks.data_size)
        streams = [iter([sample(shape, step * MICRO_BATCHES + index) for index in mine]) for _ in models]
        out = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=streams if len(models) > 1 else streams[0],
            model=models,
            num_microbatches=len(mine),
            seq_length=shape.seq_length,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        total = sum((part["loss"].double() for part in out), torch.zeros((), dtype=torch.float64))
        dist.all_reduce(total)  # the last stage of every data rank has losses, once a tensor rank
        seen.append((total.item() / MICRO_BATCHES / ranks.tensor_size, norm))
    return seen


def _prepare(shape: Any, layout: Any, build: dict[str, Any]) -> tuple[list[Any], Any]:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megagrow.model import build_model
    from tools.benchmark.weights import load_megatron, random_state

    build = {"precision": "fp32"} | build
    chunks = build_model(shape, layout, **build)
    load_megatron(chunks, random_state(shape))
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    models = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    bf16 = build["precision"] == "bf16"
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0, use_distributed_optimizer=True,
        bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, models)
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    return models, optimizer
