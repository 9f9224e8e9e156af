"""Megatron-Core without megagrow: ranks that save a tiny model in some layouts, and train on from what was made of it.

    python tests/distributed/ranks/bare.py DIRECTORY

A program of its own, which imports nothing of megagrow or of its tests. It reads `payload.json` in the directory,
saves each model in each of its layouts below `sources/`, writes the file `saved` and waits for the file `converted`.
Then it loads what lies in `converted/` as Megatron-LM does, and, in the same layout, the source directly; it trains
three steps after each and writes losses and gradient norms to `result.json`. One process imports Megatron-Core and
forks all ranks. Only what needs CUDA has a stand-in here (`shims`).
"""

# mypy: ignore-errors
import argparse
import importlib
import json
import multiprocessing
import os
import queue
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

STEPS, MICRO_BATCHES, MICRO_BATCH, SEQUENCE, VOCABULARY = 3, 4, 2, 16, 64
FULL = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
SIZES = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
    "ffn_hidden_size": 48,
}  # fmt: skip
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2}
ARGUMENTS = {
    "seq_length": SEQUENCE, "max_position_embeddings": SEQUENCE, "padded_vocab_size": VOCABULARY,
    "vocab_size": VOCABULARY, "make_vocab_size_divisible_by": 1, "group_query_attention": True, "swiglu": True,
    "normalization": "RMSNorm", "norm_epsilon": 1e-5, "add_bias_linear": False, "position_embedding_type": "rope",
    "rotary_base": 10000, "rotary_percent": 1.0, "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "use_distributed_optimizer": True,
}  # fmt: skip
"""What Megatron-LM would save of the model besides `SIZES`."""


class Norm(torch.nn.Module):
    """RMSNorm; Megatron-Core's own needs Transformer Engine or apex under sequence parallelism."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        """Normalize the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Adam(torch.optim.Optimizer):
    """Adam with the interface of Transformer Engine's and apex's: the step is a number in each parameter group."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Take a step; a group without parameters counts none, as in Transformer Engine."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                root = (state["exp_avg_sq"] / (1 - b2 ** group["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - b1 ** group["step"]))


class Stream:
    """A CUDA stream or event on which everything is done at once."""

    def __getattr__(self, name):
        return lambda *_, **__: self


class Results:
    """Passes one value from a writing process; Megatron-Core would start a server for it."""

    def __init__(self):
        self.file = tempfile.TemporaryFile()

    def put(self, value):
        """Store the value."""
        torch.save(value, self.file)
        self.file.flush()

    def get_nowait(self):
        """Return the value."""
        self.file.seek(0)
        try:
            return torch.load(self.file, weights_only=False)
        except EOFError:
            raise queue.Empty from None


def shims():
    """Stand-ins for CUDA, and for the kernels without which the distributed optimizer cannot resume."""
    cpu, type_name = torch.device("cpu"), torch.Tensor.type
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.default_stream = lambda *_, **__: Stream()
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.type = lambda self, *a, **k: (
        type_name(self, *a, **k) if a or k else "torch.cuda." + type_name(self)[6:]
    )
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    import megatron.core.optimizer as chosen
    import megatron.core.optimizer.distrib_optimizer as distributed
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    moe_utils.te_general_gemm = None
    chosen.Adam = distributed.Adam = Adam
    chosen.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
    filesystem_async._get_write_results_queue = Results


def on_cpu(factory):
    """A factory of torch with every CUDA device replaced."""

    def made(*arguments, **named):
        if str(named.get("device")).startswith("cuda"):
            named["device"] = "cpu"
        return factory(*arguments, **named)

    return made


class Model:
    """A model in a layout, with its optimizer: what a rank of Megatron-LM has."""

    def __init__(self, layout, experts):
        from megatron.core import parallel_state as groups
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
        from megatron.core.transformer.transformer_config import TransformerConfig

        groups.destroy_model_parallel()
        random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = None, False
        groups.initialize_model_parallel(**{name: size for name, size in layout.items() if name != "sequence_parallel"})
        random.model_parallel_cuda_manual_seed(7)
        config = TransformerConfig(
            **SIZES, **(EXPERTS if experts else {}), **layout, normalization="RMSNorm", gated_linear_unit=True,
            activation_func=F.silu, add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
            use_cpu_initialization=True, pipeline_dtype=torch.float32, bias_dropout_fusion=False,
            bias_activation_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
            moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.0,
        )  # fmt: skip
        spec = get_gpt_layer_local_spec(num_experts=4 if experts else None, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        if experts:  # Transformer Engine's spec does not rename the norm before experts
            spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
        block = TransformerBlockSubmodules([spec] * get_num_layers_to_build(config), layer_norm=Norm)
        torch.manual_seed(3)
        chunk = GPTModel(
            config, block, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE, position_embedding_type="rope",
            share_embeddings_and_output_weights=False, pre_process=groups.is_pipeline_first_stage(),
            post_process=groups.is_pipeline_last_stage(),
        )  # fmt: skip
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config, ddp, chunk)
        self.model.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True,
                params_dtype=torch.float32,
            ),
            [self.model],
        )  # fmt: skip
        config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, self.optimizer.scale_loss
        self.layout, self.experts = layout, experts

    def state(self, metadata, is_loading):
        """What Megatron-LM saves or loads of model and optimizer."""
        state = {"model": self.model.module.sharded_state_dict(metadata=dict(metadata))}
        state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=dict(metadata))
        return state

    def save(self, save):
        """Save as iteration 3."""
        from megatron.core import dist_checkpointing

        path = save / f"iter_{STEPS:07d}"
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
            (save / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
        dist.barrier()
        experts = {"num_experts": 4, "moe_aux_loss_coeff": 0.0, **EXPERTS} if self.experts else {}
        data = dist.get_world_size() // self.layout.get("tensor_model_parallel_size", 1)
        data //= self.layout.get("pipeline_model_parallel_size", 1)
        arguments = {**SIZES, **ARGUMENTS, **experts, **self.layout, "data_parallel_size": data}
        common = {"iteration": STEPS, "checkpoint_version": 3.0, "args": argparse.Namespace(**arguments)}
        state = {**self.state(FULL, is_loading=False), **common}
        dist_checkpointing.save(state, str(path), content_metadata=dict(FULL))

    def load(self, path, mend=False):
        """Load model and optimizer.

        Args:
            path: the checkpoint's directory.
            mend: give it this layout's parameter groups, as Megatron-Core would have to where chaining differs.
        """
        from megatron.core import dist_checkpointing

        metadata = dist_checkpointing.load_content_metadata(str(path))
        if metadata is None:  # what Megatron-LM then does
            metadata = {"distrib_optim_sharding_type": "dp_zero_gather_scatter"}
        state = self.state(metadata, is_loading=True)
        own = state["optimizer"]
        loaded = dist_checkpointing.load(state, str(path))
        assert loaded["iteration"] in (0, STEPS)
        self.model.module.load_state_dict(loaded["model"])
        optimizer = self.mended(own, loaded["optimizer"]) if mend else loaded["optimizer"]
        self.optimizer.load_state_dict(optimizer)

    def mended(self, own, loaded):
        """A loaded state with this layout's groups, at the step of the saved ones."""
        parts = [loaded, *(part for key, part in loaded.items() if isinstance(key, int))]
        steps = {g["step"] for part in parts for g in part.get("optimizer", {}).get("param_groups", ()) if "step" in g}
        (step,) = steps
        alone = "param_state" in own
        states = {}
        for number, part in {0: own}.items() if alone else own.items():
            groups = [{**group, "step": step} for group in part["optimizer"]["param_groups"]]
            found = loaded if alone else loaded[number]
            states[number] = {**part, "optimizer": {"param_groups": groups}, "param_state": found["param_state"]}
        return states[0] if alone else states

    def train(self, first):
        """Take three steps; return loss and gradient norm of each."""
        from megatron.core import parallel_state as groups
        from megatron.core.pipeline_parallel import get_forward_backward_func

        places = torch.arange(SEQUENCE)[None].expand(MICRO_BATCH, -1)
        mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]

        def forward(samples, model):
            tokens = next(samples)
            out = model(tokens[:, :-1], places, mask, labels=tokens[:, 1:].contiguous())
            return out, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

        seen = []
        for step in range(first, first + STEPS):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            mine = range(groups.get_data_parallel_rank(), MICRO_BATCHES, groups.get_data_parallel_world_size())
            out = get_forward_backward_func()(
                forward_step_func=forward, data_iterator=iter([sample(step * MICRO_BATCHES + at) for at in mine]),
                model=[self.model], num_microbatches=len(mine), seq_length=SEQUENCE, micro_batch_size=MICRO_BATCH,
                forward_only=False,
            )  # fmt: skip
            done, norm, _ = self.optimizer.step()
            assert done
            total = sum((part["loss"].double() for part in out), torch.zeros((), dtype=torch.float64))
            dist.all_reduce(total)
            seen.append((float(total) / MICRO_BATCHES / groups.get_tensor_model_parallel_world_size(), float(norm)))
        return seen


def sample(index):
    """Micro-batch number `index`: tokens [b, s + 1]."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=generator)


def begin(place, models):
    """Train each model three steps in its first layout, and save it in all of them."""
    for name, told in models.items():
        origin = None
        for label in told["sources"]:
            model = Model(told["layouts"][label], told["experts"])
            if origin is None:
                model.train(0)
                origin = place / "sources" / name / label
            else:
                model.load(origin / f"iter_{STEPS:07d}", mend=True)
            model.save(place / "sources" / name / label)


def go_on(place, models):
    """Losses after loading each conversion, and the source itself, by model, target and source."""
    found = {}
    for name, told in models.items():
        for label, sources in told["targets"].items():
            model = Model(told["layouts"][label], told["experts"])
            for source in sources:
                made = place / "converted" / name / label / source
                path = next(path for path in sorted(made.iterdir()) if path.name.startswith("iter_"))
                losses = {"converted": attempt(model, path, False)}
                if source in told["sources"]:
                    saved = place / "sources" / name / source / f"iter_{STEPS:07d}"
                    losses["direct"] = attempt(model, saved, True)
                found.setdefault(name, {}).setdefault(label, {})[source] = losses
    return found


def attempt(model, path, mend):
    """Losses after loading, or what Megatron-Core says against it."""
    try:
        model.load(path, mend)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return model.train(STEPS)


def rank_main(rank, world, port, place, models):
    """The life of a rank."""
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
        begin(place, models)
        if rank == 0:
            (place / "saved").touch()
        while not (place / "converted.done").exists():
            time.sleep(0.05)
        found = go_on(place, models)
        assert not [name for name in sys.modules if name.partition(".")[0] in ("megagrow", "tests", "tools")]
        if rank == 0:
            (place / "result.json").write_text(json.dumps(found))
        dist.barrier()
    except BaseException:  # Megatron-Core's checkpoint errors are no Exceptions
        traceback.print_exc()
        (place / "failed").touch()
        os._exit(1)
    os._exit(0)


def main():
    """Import once, fork the ranks, and wait for them."""
    place = Path(sys.argv[1])
    payload = json.loads((place / "payload.json").read_text())
    torch.set_num_threads(1)
    shims()
    for name in ("distributed", "models.gpt.gpt_model", "pipeline_parallel"):  # imported once, for all ranks
        importlib.import_module(f"megatron.core.{name}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, world = multiprocessing.get_context("fork"), payload["world"]
    ranks = [
        context.Process(target=rank_main, args=(rank, world, port, place, payload["models"])) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    parent = os.getppid()
    while any(process.is_alive() for process in ranks):
        if (place / "failed").exists() or os.getppid() != parent:
            for process in ranks:
                process.kill()
        time.sleep(0.1)
    return int(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    sys.exit(main())
