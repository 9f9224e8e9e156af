"""What Megatron-Core writes in its newer and odder layouts, read as the tensors that it would write fully reshardable.

One start of four ranks. Each case is a model in a layout after a step of Adam; it is saved in several layouts of the
checkpoint, and all of them must be read equal to the last bit. The optimizer's flat buckets (`dp_reshardable`) are
then converted and trained on, under other tensor-parallel sizes than Megatron-Core itself could load them.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megagrow.checkpoint.formats.torch_dist.flat_optimizer import (
    FlatOptimizerReader,
    is_dp_reshardable,
    read_flat_optimizer,
)
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.config import ModelShape, ParallelLayout
from tests.distributed.ranks.families import GPT, LLAMA
from tests.distributed.ranks.launcher import run_ranks
from tests.distributed.ranks.steps import sample

WORDS = {"vocab_size": 250, "make_vocab_size_divisible_by": 4, "seq_length": 16, "kv_channels": 8}
TIED = GPT | WORDS | {"num_layers": 2, "qk_layernorm": True}
MIXTURE = LLAMA | WORDS | {
    "num_layers": 2, "num_moe_experts": 4, "moe_ffn_hidden_size": 40, "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
TP2, PP2, DP2 = ({f"{name}_parallel_size": 2} for name in ("tensor_model", "pipeline_model", "data"))
EP2 = {"expert_model_parallel_size": 2}
FULL = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
DP = FULL | {"distrib_optim_sharding_type": "dp_reshardable"}
ZERO = {"distrib_optim_sharding_type": "dp_zero_gather_scatter", "chained_optim_avoid_prefix": False}
HALVES = FULL | {"singleton_local_shards": True}
LAYERS = FULL | {"non_homogeneous_layers": True}
LAST = "Et|t*2|t|L"
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A model in a layout, and the layouts of the checkpoint that are compared with a fully reshardable one.

    `like` names the case whose fully reshardable one that is: where a rank's buffer has several buckets, Megatron-Core
    0.16.1 (and 0.19.2) leaves out their padding when it saves and counts it when it cuts, so what it saves fully
    reshardable is shifted, with zeros at the end.
    """

    shape: dict[str, Any]
    layout: dict[str, Any]
    precision: str = "fp32"
    saves: dict[str, dict[str, Any]] = field(default_factory=lambda: {"dp": DP, "gathered": ZERO})
    ddp: dict[str, Any] = field(default_factory=dict)
    distributed: bool = True
    like: str = ""


CASES = {
    "DP4 tied": Case(TIED, {"data_parallel_size": 4}),
    "PP2 DP2 tied": Case(TIED, PP2 | DP2, like="DP4 tied"),
    "TP2 DP2": Case(LLAMA | WORDS, TP2 | DP2),
    "TP2 DP2 buckets": Case(
        LLAMA | WORDS, TP2 | DP2, ddp={"overlap_grad_reduce": True, "bucket_size": 3000}, like="TP2 DP2"
    ),
    "TP2 DP2 bf16": Case(
        LLAMA | WORDS, TP2 | DP2, "bf16", {"dp": DP, "gathered": ZERO, "halves": HALVES, "layers": LAYERS}
    ),
    "PP2 VPP2 DP2": Case(LLAMA | WORDS, PP2 | DP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "EP2 DP4": Case(
        MIXTURE,
        EP2 | {"data_parallel_size": 4},
        "bf16",
        {"dp": DP, "gathered": ZERO, "halves": HALVES, "layers": LAYERS},
    ),
    "TP2 EP2 DP2": Case(MIXTURE, TP2 | EP2 | DP2 | {"sequence_parallel": True}),
    "TP2 EP2 ETP1 DP2": Case(MIXTURE, TP2 | EP2 | DP2 | {"sequence_parallel": True, "expert_tensor_parallel_size": 1}),
    "PP2 DP2 first 3": Case(LLAMA | WORDS, PP2 | DP2 | {"decoder_first_pipeline_num_layers": 3}),
    "PP2 DP2 loss apart": Case(
        LLAMA | WORDS, PP2 | DP2 | {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": LAST}
    ),
    "PP2 TP2 mixture": Case(MIXTURE, PP2 | TP2 | {"sequence_parallel": True}),
    "plain fp32": Case(LLAMA | WORDS, TP2 | DP2, saves={"plain": {}}, distributed=False),
    "plain bf16": Case(LLAMA | WORDS, TP2 | DP2, "bf16", {"plain": {}}, distributed=False),
}
WIDE = LLAMA | WORDS | {"num_query_groups": 4, "num_layers": 2}
TARGETS = {"TP1": {"data_parallel_size": 4}, "TP4": {"tensor_model_parallel_size": 4}}


def build(case: Case) -> tuple[list[Any], Any]:
    """The model's chunks under DDP with fresh weights, and the optimizer; Megatron-Core is started."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megagrow import runtime
    from megagrow.checkpoint.live.live import fill_fresh
    from megagrow.model import build_model

    shape, layout = ModelShape(**case.shape), ParallelLayout(**case.layout)
    runtime.start(**layout.groups, seed=11)
    chunks = build_model(shape, layout, precision=case.precision)  # type: ignore[arg-type]  # one of the literals
    fill_fresh(chunks, shape, seed=3)
    config, half = chunks[0].config, case.precision == "bf16"
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed, **case.ddp
    )
    models = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=0.0, use_distributed_optimizer=case.distributed,
        bf16=half, params_dtype=torch.bfloat16 if half else torch.float32,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, models)
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss
    return models, optimizer


def adam_step(models: list[Any], optimizer: Any) -> None:
    """A step on made-up gradients: equal wherever two ranks hold the same parameter, for they follow from it."""
    for model in models:
        for parameter in model.parameters():
            values = parameter.detach().float()
            parameter.main_grad.copy_(torch.sin(values * 1e3 + torch.arange(values.numel()).view(values.shape)))
    optimizer.step()


def state_of(models: list[Any], optimizer: Any, metadata: dict[str, Any], *, loading: bool = False) -> dict[str, Any]:
    """What Megatron-Core saves or loads."""
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]
    state = {
        name: model.module.sharded_state_dict(metadata=dict(metadata))
        for name, model in zip(names, models, strict=True)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=dict(metadata))
    return state


def save(path: Path, models: list[Any], optimizer: Any, metadata: dict[str, Any]) -> None:
    """Save in a layout of the checkpoint."""
    from megatron.core import dist_checkpointing

    from megagrow.checkpoint.live.live import _results_by_file

    path.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    with _results_by_file(), gathering_by_gloo(optimizer) if metadata is ZERO else nullcontext():
        dist_checkpointing.save(
            state_of(models, optimizer, metadata),
            str(path),
            content_metadata=dict(metadata),
            validate_access_integrity=False,
        )


@contextmanager
def gathering_by_gloo(optimizer: Any) -> Iterator[None]:
    """Megatron-Core gathers on the GPU what it saves as dp_zero_gather_scatter, unless it is told not to."""
    with ExitStack() as stack:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.data_parallel_group_gloo = part.data_parallel_group
            gather = part.get_parameter_state_dp_zero
            stack.enter_context(
                mock.patch.object(part, "get_parameter_state_dp_zero", lambda gather=gather, **_: gather())
            )
        yield


def train(models: list[Any], optimizer: Any, shape: ModelShape) -> list[float]:
    """Losses of a few real steps."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ranks
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(batches: Iterator[torch.Tensor], model: Any) -> Any:
        tokens = next(batches)
        positions = torch.arange(shape.seq_length)[None].expand(len(tokens), -1)
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
        return losses, lambda out: (out.mean(), {"loss": out.detach().mean()})

    seen = []
    for step in range(STEPS):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        mine = range(ranks.get_data_parallel_rank(), 4, ranks.get_data_parallel_world_size())
        out = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([sample(shape, step * 4 + index) for index in mine]),
            model=models, num_microbatches=len(mine), seq_length=shape.seq_length, micro_batch_size=2,
            forward_only=False,
        )  # fmt: skip
        optimizer.step()
        total = torch.stack([part["loss"].double() for part in out]).sum()
        dist.all_reduce(total)
        seen.append(total.item() / 4 / ranks.get_tensor_model_parallel_world_size())
    return seen


def work(root: Path) -> dict[str, Any]:
    """The part of each of four ranks."""
    from megagrow import runtime

    for name, case in CASES.items():
        models, optimizer = build(case)
        adam_step(models, optimizer)
        if case.distributed and not case.like:
            save(root / name / "full", models, optimizer, FULL)
        for kind, metadata in case.saves.items():
            save(root / name / kind, models, optimizer, metadata)
        runtime.reset()
    return show(root / "show")


def show(root: Path) -> dict[str, Any]:
    """Losses after loading the source, and after loading what it was converted to in other layouts."""
    from megatron.core import dist_checkpointing

    from megagrow import runtime
    from megagrow.checkpoint.live.live import LiveCheckpoint

    source = Case(WIDE, TP2 | DP2)
    shape = ModelShape(**source.shape)
    models, optimizer = build(source)
    train(models, optimizer, shape)
    save(root / "source", models, optimizer, DP)
    runtime.reset()
    models, optimizer = build(source)
    loaded = dist_checkpointing.load(state_of(models, optimizer, DP, loading=True), str(root / "source"))
    models[0].module.load_state_dict(loaded["model"])
    with torch.no_grad():  # Megatron-Core writes to leaves in place
        optimizer.load_state_dict(loaded["optimizer"])
    losses = {"source": train(models, optimizer, shape)}
    runtime.reset()
    if os.environ["RANK"] == "0":
        convert(root / "source", root / "full", shape, ParallelLayout(**source.layout))
    for name, layout in TARGETS.items():
        models, optimizer = build(Case(WIDE, layout))  # waits for rank 0
        LiveCheckpoint(models, optimizer).load(root / "full", optimizer=True, rng=False)
        losses[name] = train(models, optimizer, shape)
        runtime.reset()
    return losses


def convert(source: Path, target: Path, shape: ModelShape, layout: ParallelLayout) -> None:
    """Write the canonical tensors of a checkpoint, and nothing of how they were stored."""
    from megagrow.checkpoint.tensors.table import extra_state_keys
    from tools.reference.torch_dist_writer import Writer

    reader = read_flat_optimizer(TorchDistReader(source), shape, layout)
    target.mkdir()
    writer = Writer(target)
    for key, info in reader.tensors.items():
        writer.put(key, info.shape, (0,) * len(info.shape), reader.read_whole(key))
    for key in extra_state_keys(shape):
        writer.put_object(key, [None])
    writer.finish(reader.common())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def losses(root: Path) -> dict[str, list[float]]:
    """What the ranks say; they leave the checkpoints of all cases in `root`."""
    return run_ranks("tests.distributed.checkpoint.test_layouts_read:work", 4, root)[0]


SAVES = [(name, kind) for name, case in CASES.items() if case.distributed for kind in case.saves]


@pytest.mark.parametrize(("name", "kind"), SAVES, ids=[f"{name}, {kind}" for name, kind in SAVES])
def test_every_layout_is_read_as_the_fully_reshardable_one(
    name: str, kind: str, root: Path, losses: dict[str, list[float]]
) -> None:
    case, wanted = CASES[name], TorchDistReader(root / (CASES[name].like or name) / "full")
    reader = TorchDistReader(root / name / kind)
    assert is_dp_reshardable(reader) == (kind == "dp")
    written = ParallelLayout(**case.layout)
    for layout in (written,) if written.uneven else (written, None):  # an uneven one cannot be found without arguments
        found = read_flat_optimizer(reader, ModelShape(**case.shape), layout)
        assert found.common() == wanted.common() and set(found.tensors) == set(wanted.tensors)
        for key, info in wanted.tensors.items():
            assert found.tensors[key].shape == info.shape and found.tensors[key].dtype == info.dtype, key
            one, other = found.read_whole(key), wanted.read_whole(key)
            # the last values of a shard are computed one by one, so another cut may round them otherwise
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-12) if case.like else torch.equal(one, other), key
        check_masters(found)


def check_masters(reader: TorchDistReader | FlatOptimizerReader) -> None:
    """Masters are there for every weight, and rounded they are the weights."""
    weights = [key for key in reader.tensors if not key.startswith("optimizer.")]
    assert len(reader.tensors) == 4 * len(weights)
    for key in weights:
        master = reader.read_whole(f"optimizer.state.param.{key}")
        assert master.dtype == torch.float32
        assert torch.equal(master.to(reader.tensors[key].dtype.torch), reader.read_whole(key)), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.distributed])
def test_without_the_distributed_optimizer_masters_are_found(
    name: str, root: Path, losses: dict[str, list[float]]
) -> None:
    check_masters(TorchDistReader(root / name / "plain"))


@pytest.mark.parametrize("target", TARGETS)
def test_training_goes_on_from_flat_buckets_in_other_layouts(target: str, losses: dict[str, list[float]]) -> None:
    assert losses["source"][0] != losses["source"][1]
    assert losses[target] == pytest.approx(losses["source"], rel=1e-6)
