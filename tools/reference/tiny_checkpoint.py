"""A tiny but complete checkpoint on disk, made without training: random weights, Adam's state, manifest, seal."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagrow.checkpoint.directory import integrity, iterations
from megagrow.checkpoint.directory.manifest import Manifest, write_manifest
from megagrow.checkpoint.tensors import extra_state_keys, optimizer_key, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from tools.reference.torch_dist_writer import Writer

SMALL = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "num_query_groups": 2}
LARGE = {"num_layers": 3, "hidden_size": 12, "ffn_hidden_size": 20, "num_attention_heads": 4, "num_query_groups": 2}


def shape(sizes: dict[str, int], **others: Any) -> ModelShape:
    """A tiny Llama."""
    rest = {"kv_channels": 4, "vocab_size": 30, "make_vocab_size_divisible_by": 2, "seq_length": 8}
    return ModelShape(**sizes, **rest | others)


def random_state(of: ModelShape, *, optimizer: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of a shape; weights are the masters in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for kind in tensor_kinds(of):
        master = torch.randn(kind.global_shape(of), generator=generator)
        state[kind.key] = master.to(dtype)
        if optimizer:
            state[optimizer_key("param", kind.key)] = master
            state[optimizer_key("exp_avg", kind.key)] = torch.randn(master.shape, generator=generator)
            state[optimizer_key("exp_avg_sq", kind.key)] = torch.randn(master.shape, generator=generator) ** 2
    return state


def write_checkpoint(
    save: Path, of: ModelShape, state: dict[str, Tensor], *, iteration: int = 10, seal: bool = True, **manifest: Any
) -> Path:
    """Publish a checkpoint in `save`, tracker included; return its directory. Layers are chunks of their own."""
    staging = iterations.new_staging(iterations.iteration_path(save, iteration))
    writer = Writer(staging)
    for key, values in state.items():
        for layer in range(values.shape[0] if "decoder.layers." in key else 0):
            writer.put(key, tuple(values.shape), (layer, *[0] * (values.dim() - 1)), values[layer : layer + 1])
        if "decoder.layers." not in key:
            writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    for key in extra_state_keys(of):
        writer.put_object(key, [None])
    group = {"lr": 1e-3, "step": iteration, "lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": False}
    groups = [{**group, "wd_mult": 1.0}, {**group, "wd_mult": 0.0}]
    full = "fully_reshardable"
    common: dict[str, Any] = {"iteration": iteration}
    if any(key.startswith("optimizer.") for key in state):
        common["optimizer"] = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": full}
    common["content_metadata"] = {"distrib_optim_sharding_type": full, "chained_optim_avoid_prefix": True}
    writer.finish(common)
    half = state["embedding.word_embeddings.weight"].dtype == torch.bfloat16
    fields = {
        "family": "tiny", "stage": "small", "iteration": iteration, "shape": of, "layout": ParallelLayout(),
        "precision": "bf16" if half else "fp32", "position": {"corpus": 80}, "consumed_samples": 80,
        "consumed_tokens": 640, "flops": 1e6, "optimizer": any(key.startswith("optimizer.") for key in state),
    }  # fmt: skip
    write_manifest(staging, Manifest(**fields | manifest))
    if seal:
        integrity.seal(staging)
    final = iterations.iteration_path(save, iteration)
    iterations.publish(staging, final)
    iterations.write_tracker(save, iteration)
    return final
