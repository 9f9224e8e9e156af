"""Tokens per second of one training step: megagrow's path against plain PyTorch and bare Megatron-Core.

All three train the same shape from the same weights on the same tokens, in one process, a few steps each in turns
(A B C A B C ...), so that whatever else the machine does disturbs them alike. The losses of the first step must
agree before anything is timed. Ratios are of medians of wall time; CPU time stands beside them.

    OMP_NUM_THREADS=2 python -m tools.benchmark.training_speed --rounds 8
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megagrow import runtime
from megagrow.config import ModelShape, ParallelLayout
from megagrow.model import build_model, transformer_config
from tools.benchmark.plain_gpt import PlainGPT
from tools.benchmark.weights import load_megatron, load_plain, random_state

LEARNING_RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
Step = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Contender:
    """A way to train, and what it has taken so far, in seconds a step."""

    name: str
    step: Step
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """One timed step; returns the loss."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.step(tokens, labels)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return loss


def megatron_step(chunk: Any, config: Any, shape: ModelShape, micro_batches: int, mask: bool) -> Step:
    """A step as Megatron-Core takes it: DDP, distributed optimizer, clipping, the schedule without pipelining."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, chunk)
    settings = OptimizerConfig(
        optimizer="adam", lr=LEARNING_RATE, weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        params_dtype=torch.float32, use_distributed_optimizer=True, clip_grad=CLIP,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    schedule = get_forward_backward_func()
    length = shape.seq_length
    positions = torch.arange(length)[None]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None] if mask else None

    def forward_step(batches: Any, model: Any) -> Any:
        tokens, labels = next(batches)
        losses = model(tokens, positions.expand_as(tokens), hidden, labels=labels)
        return losses, lambda out: (out.mean(), {"loss": out.detach().mean()})

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        out = schedule(
            forward_step_func=forward_step,
            data_iterator=zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True),
            model=[model],
            num_microbatches=micro_batches,
            seq_length=length,
            micro_batch_size=len(tokens) // micro_batches,
            forward_only=False,
        )
        optimizer.step()
        return sum(part["loss"].item() for part in out) / micro_batches

    return step


def megagrow_step(shape: ModelShape, state: dict[str, torch.Tensor], micro_batches: int) -> Step:
    """Megagrow's model and Adam in Megatron-Core's step."""
    chunks = build_model(shape, ParallelLayout(), precision="fp32")
    load_megatron(chunks, state)
    return megatron_step(chunks[0], chunks[0].config, shape, micro_batches, mask=False)


def bare_step(shape: ModelShape, state: dict[str, torch.Tensor], micro_batches: int) -> Step:
    """Megatron-Core as it is without CUDA: local spec, its attention and norm, torch's AdamW."""
    from megatron.core import optimizer
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import distrib_optimizer

    config = replace(
        transformer_config(shape, ParallelLayout(), precision="fp32", accumulate_in_place=False),
        use_te_activation_func=False,
    )
    chunk = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.seq_length, position_embedding_type="rope", rotary_base=shape.rotary_base,
    )  # fmt: skip
    load_megatron([chunk], state)
    saved = optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE
    optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = True, False
    try:
        return megatron_step(chunk, config, shape, micro_batches, mask=True)
    finally:
        optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = saved


def plain_step(shape: ModelShape, state: dict[str, torch.Tensor], micro_batches: int, kind: str) -> Step:
    """Plain PyTorch with torch's AdamW, weight decay on matrices only as in Megatron-Core."""
    model = PlainGPT(shape)
    load_plain(model, state)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, **{kind: True})

    def step(tokens: torch.Tensor, labels: torch.Tensor) -> float:
        optimizer.zero_grad()
        total = 0.0
        for part, wanted in zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
            loss = model.loss(part, wanted) / micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        return total

    return step


def measure(shape: ModelShape, batch: int, micro_batches: int, rounds: int, only: str) -> dict[str, Any]:
    """Run the rounds and return the table as plain values."""
    state = random_state(shape)
    makers: dict[str, Callable[[], Step]] = {
        "megagrow": lambda: megagrow_step(shape, state, micro_batches),
        "plain-fused": lambda: plain_step(shape, state, micro_batches, "fused"),
        "plain-foreach": lambda: plain_step(shape, state, micro_batches, "foreach"),
        "bare-megatron": lambda: bare_step(shape, state, micro_batches),
    }
    contenders = [Contender(name, make()) for name, make in makers.items() if only in ("", name)]
    generator = torch.Generator().manual_seed(0)
    losses: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(rounds + 1):
        sample = torch.randint(0, shape.vocab_size, (batch, shape.seq_length + 1), generator=generator)
        for contender in contenders:
            losses[contender.name].append(contender.run(sample[:, :-1].contiguous(), sample[:, 1:].contiguous()))
        first = [values[index] for values in losses.values()]
        if index == 0 and max(first) - min(first) > 1e-4:
            raise SystemExit(f"losses of the first step differ: {dict(zip(losses, first, strict=True))}")
    table = {
        contender.name: {
            "loss": losses[contender.name],
            "wall": contender.wall[1:],
            "cpu": contender.cpu[1:],
            "tokens_per_second": batch * shape.seq_length / statistics.median(contender.wall[1:]),
        }
        for contender in contenders
    }
    count = sum(tensor.numel() for tensor in state.values())
    return {"parameters": count, "threads": torch.get_num_threads(), "rounds": rounds, "contenders": table}


def paired(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of how many times longer they took than we did in the same round."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def show(result: dict[str, Any]) -> None:
    """Print the table and how fast megagrow is beside each of the others (above 1: faster)."""
    print(f"{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads, {result['rounds']} rounds")
    print(
        f"{'':15} {'tok/s':>6} {'median s':>8} {'min s':>6} {'cpu s':>6} {'loss 0':>8} {'last':>8}  ours is faster by"
    )
    ours = result["contenders"].get("megagrow")
    for name, row in result["contenders"].items():
        wall, cpu = row["wall"], row["cpu"]
        ratios = "" if ours is None else (
            f"wall, paired {paired(wall, ours['wall']):.3f}  wall, min {min(wall) / min(ours['wall']):.3f}  "
            f"cpu, paired {paired(cpu, ours['cpu']):.3f}  cpu, min {min(cpu) / min(ours['cpu']):.3f}"
        )  # fmt: skip
        print(
            f"{name:15} {row['tokens_per_second']:6.0f} {statistics.median(wall):8.3f} {min(wall):6.3f} "
            f"{statistics.median(cpu):6.3f} {row['loss'][0]:8.5f} {row['loss'][-1]:8.5f}  {ratios}"
        )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--ffn-hidden-size", type=int, default=1376)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--num-query-groups", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--micro-batches", type=int, default=1, help="parts that the batch is cut into")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each, after one that is not timed")
    parser.add_argument("--only", default="", help="one contender by name")
    parser.add_argument("--profile", action="store_true", help="where the time of --only goes, by operation")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    names = [name for name in ModelShape.model_fields if hasattr(options, name)]
    shape = ModelShape(**{name: getattr(options, name) for name in names})
    runtime.start()
    try:
        arguments = (shape, options.batch, options.micro_batches, options.rounds, options.only)
        if options.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                measure(*arguments)
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
            return
        result = measure(*arguments)
        print(json.dumps(result)) if options.json else show(result)
    finally:
        runtime.stop()


if __name__ == "__main__":
    main()
