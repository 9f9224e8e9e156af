"""One rank of stock Megatron-LM's `pretrain_gpt.py` on CPU, to be started by torchrun.

    torchrun --nproc-per-node 2 tools/megatron_lm/rank.py MEGATRON_LM --flags of pretrain_gpt.py

CUDA is replaced as in megagrow's own runs (`megagrow.runtime.cpu`), FusedAdam by `megagrow.runtime.adam`, and the few
attributes that only Megatron-LM's `megatron/training` uses are replaced here. Nothing else of megagrow is imported, and
no file of Megatron-LM is changed. Line numbers are those of core_v0.16.1.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

STEPS = "STOCK_MEGATRON_STEPS"
"""The variable that names a file for the steps' figures; each rank that has losses writes them."""


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _properties(*_: Any) -> Any:
    return SimpleNamespace(major=9)


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _recorded(log: Any) -> Any:
    """Megatron-LM's `training_log`, which also appends each step's loss, rate and gradient norm, unrounded, to a file.

    It takes loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag, skipped_iter and
    grad_norm first (training 1756).
    """
    file = os.environ.get(STEPS)

    def log_step(losses: Any, totals: Any, rate: Any, iteration: int, *rest: Any, **more: Any) -> Any:
        if file and losses:  # empty on all but the last pipeline stage
            step = {"iteration": iteration, "loss": float(losses["lm loss"]), "rate": rate, "norm": float(rest[3])}
            with open(file, "a") as stream:
                stream.write(json.dumps(step) + "\n")
        return log(losses, totals, rate, iteration, *rest, **more)

    return log_step


def install() -> None:
    """Replace what needs a GPU."""
    from megagrow.runtime import adam, cpu

    cpu.install()
    adam.install()
    torch.cuda.set_device = _nothing  # initialize 331
    torch.cuda.device_count = lambda: 1  # initialize 319 and 422: 0 would skip the groups and the seeds
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)  # checkpointing 1866
    torch.cuda.get_device_properties = _properties  # type: ignore[assignment]  # a stand-in; utils 448, asked for with TP above 1
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = _zero  # utils 284
    torch.cuda.memory_reserved = torch.cuda.max_memory_reserved = _zero

    from megatron.training import initialize, training

    training.training_log = _recorded(training.training_log)
    start = training.initialize_megatron
    training.initialize_megatron = lambda *words, **more: start(*words, **{**more, "allow_no_cuda": True})
    training.set_jit_fusion_options = _nothing  # it warms up kernels of CUDA
    initialize._compile_dependencies = _nothing  # fused kernels of CUDA


def main() -> None:
    """Run pretrain_gpt.py with the remaining arguments."""
    tree = Path(sys.argv.pop(1)).resolve()
    sys.path.insert(0, str(tree))
    install()
    sys.argv[0] = str(tree / "pretrain_gpt.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
