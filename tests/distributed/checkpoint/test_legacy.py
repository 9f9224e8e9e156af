"""Legacy checkpoints that real Megatron-Core wrote are read bit for bit as it would load them, and ours it loads.

Each case builds a model with an optimizer, takes two steps, and saves it twice: as Megatron-LM saves with
`--ckpt-format torch`, and as torch_dist. Both must read the same. One start of one rank and one of two do all cases;
what four ranks would load of an export is loaded by one process that plays each of them in turn.
"""

import argparse
import os
import signal
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megagrow.checkpoint.formats.legacy.read import open_legacy
from megagrow.checkpoint.formats.megatron_common.arguments import arguments_of
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index.dtypes import DType
from megagrow.config import ModelShape, ParallelLayout
from megagrow.convert.targets.legacy import LegacyTarget
from megagrow.errors import CheckpointError
from tests.distributed.ranks.launcher import run_ranks
from tools.reference.memory import MemoryStore
from tools.reference.tiny_checkpoint import random_state

STEPS = 2
SIZES = {
    "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 6, "vocab_size": 90, "make_vocab_size_divisible_by": 4, "seq_length": 16,
}  # fmt: skip
LLAMA = ModelShape(**SIZES)
GPT = ModelShape(
    **SIZES, normalization="LayerNorm", position_embedding_type="learned_absolute", swiglu=False, add_bias_linear=True,
    untie_embeddings_and_output_weights=False, qk_layernorm=True,
)  # fmt: skip
MIXTURE = ModelShape(
    **SIZES, num_moe_experts=4, moe_ffn_hidden_size=20, moe_shared_expert_intermediate_size=12, qk_layernorm=True
)


class Case(NamedTuple):
    """What is trained and saved; `bucket_size` is that of overlapped gradient reduction."""

    shape: ModelShape
    layout: ParallelLayout
    precision: str
    distributed: bool
    bucket_size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def layout(**sizes: int) -> ParallelLayout:
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "ep": "expert"}
    given = {f"{names[name]}_model_parallel_size": size for name, size in sizes.items() if name in names}
    return ParallelLayout(**given, data_parallel_size=sizes.get("dp", 1))


CASES = {
    1: {
        "TP1 plain fp32": Case(LLAMA, layout(), "fp32", False),
        "TP1 plain bf16 tied": Case(GPT, layout(), "bf16", False),
        "TP1 distributed bf16 buckets": Case(GPT, layout(), "bf16", True, 3001),
    },
    2: {
        "TP2 plain bf16": Case(LLAMA, layout(tp=2), "bf16", False),
        "TP2 distributed fp32": Case(GPT, layout(tp=2), "fp32", True),
        "PP2 plain fp32 tied": Case(GPT, layout(pp=2), "fp32", False),
        "PP2 distributed bf16 tied buckets": Case(GPT, layout(pp=2), "bf16", True, 2003),
        "PP2 VPP2 plain bf16": Case(LLAMA, layout(pp=2, vpp=2), "bf16", False),
        "PP2 VPP2 distributed fp32": Case(LLAMA, layout(pp=2, vpp=2), "fp32", True),
        "DP2 distributed bf16 buckets": Case(LLAMA, layout(dp=2), "bf16", True, 1009),
        "EP1 distributed bf16": Case(MIXTURE, layout(dp=2), "bf16", True),
        "EP2 plain fp32": Case(MIXTURE, layout(dp=2, ep=2), "fp32", False),
        "EP2 distributed bf16": Case(MIXTURE, layout(dp=2, ep=2), "bf16", True),
    },
}
ALL = [(world, name) for world, cases in CASES.items() for name in cases]
EXPORTS = {
    "dense TP2 PP2": (LLAMA, layout(tp=2, pp=2)),
    "tied PP2 VPP2": (GPT, layout(pp=2, vpp=2)),
    "mixture TP1 EP2": (MIXTURE, layout(dp=2, ep=2)),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """Where the ranks of all cases have saved, and what they have loaded of exports that lie there too."""
    directory = tmp_path_factory.mktemp("legacy")
    export(directory)
    loaded = [run_ranks("tests.distributed.checkpoint.test_legacy:work", world, directory)[0] for world in CASES]
    return directory, loaded[0]


@pytest.fixture(scope="module")
def root(told: tuple[Path, dict[str, list[Any]]]) -> Path:
    """Where it all lies."""
    return told[0]


def work(root: Path) -> dict[str, list[Any]]:
    """Train and save all cases of this world; one rank alone also loads the exports."""
    import torch.distributed as dist

    world = int(os.environ["WORLD_SIZE"])
    for name, case in CASES[world].items():
        train_and_save(root / name, case)
    if world > 1:
        return {}
    dist.destroy_process_group()
    return load_exports(root)


def export(root: Path) -> None:
    """Write exports of random weights in several layouts."""
    for name, (shape, cut) in EXPORTS.items():
        source = MemoryStore(random_state(shape, optimizer=False))
        made = LegacyTarget(source, shape, cut, DType.FLOAT32, {"iteration": 3}, 4096, implementation="local")
        for unit, (file,) in enumerate(made.units):
            (root / name / file.name).parent.mkdir(parents=True)
            (root / name / file.name).write_bytes(b"".join(bytes(data) for _, data in made.produce(unit)))
        made.finish(root / name)


def train_and_save(path: Path, case: Case) -> None:
    """One case, on every rank."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megagrow import runtime
    from megagrow.checkpoint.live.live import LiveCheckpoint
    from megagrow.model import build_model

    ranks = runtime.start(**case.layout.groups)
    chunks = build_model(case.shape, case.layout, precision=case.precision)  # type: ignore[arg-type]  # one of the literals
    fill(chunks)
    distributed = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=case.distributed,
        overlap_grad_reduce=case.bucket_size is not None,
        bucket_size=case.bucket_size,
    )
    wrapped = [
        DistributedDataParallel(chunks[0].config, distributed, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.1, bf16=case.precision == "bf16", params_dtype=case.dtype,
        use_distributed_optimizer=case.distributed,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, wrapped)
    for _ in range(STEPS):
        with torch.no_grad():
            for chunk in wrapped:
                for parameter in chunk.parameters():
                    parameter.main_grad.copy_(torch.sin(1000 * parameter.float()))
        optimizer.step()
    if ranks.is_main:
        (path / "torch_dist").mkdir(parents=True)
    dist.barrier()
    LiveCheckpoint(wrapped, optimizer).save(path / "torch_dist", {"iteration": STEPS}, lambda: None, background=False)
    save_legacy(path / "legacy", case, chunks, optimizer)
    dist.barrier()
    runtime.reset()


def fill(chunks: Any) -> None:
    """Give every shard random values that all its replicas share."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor):
                name = f"{shard.key} {shard.global_offset}".encode()
                values = torch.randn(shard.data.shape, generator=torch.Generator().manual_seed(zlib.crc32(name)))
                shard.data.data.copy_(values)


def save_legacy(path: Path, case: Case, chunks: Any, optimizer: Any) -> None:
    """What Megatron-LM's `save_checkpoint` does on each rank for `--ckpt-format torch`."""
    from megatron.core import parallel_state as parallel
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    name = rank_directory(case.layout)
    (path / name).mkdir(parents=True, exist_ok=True)
    if case.distributed:
        optimizer.save_parameter_state(path / name / "distrib_optim.pt")
    if parallel.get_expert_data_parallel_rank() != 0:
        return
    args = argparse.Namespace(
        **arguments_of(case.shape, case.layout, DType.of(case.dtype)) | {"params_dtype": case.dtype},
        use_distributed_optimizer=case.distributed, overlap_grad_reduce=case.bucket_size is not None,
        ddp_bucket_size=case.bucket_size, attention_backend=AttnBackend.auto, model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM, data_path=[Path("corpus")], consumed_train_samples=80,
    )  # fmt: skip
    state = {"args": args, "checkpoint_version": 3.0, "iteration": STEPS}
    for index, chunk in enumerate(chunks):
        state["model" if len(chunks) == 1 else f"model{index}"] = chunk.state_dict_for_save_checkpoint()
    state["optimizer"] = optimizer.state_dict()
    state["rng_state"] = [{"torch_rng_state": torch.get_rng_state()}]
    torch.save(state, path / name / "model_optim_rng.pt")


@pytest.mark.parametrize("world,name", ALL)
def test_legacy_reads_as_torch_dist_does(root: Path, world: int, name: str) -> None:
    case = CASES[world][name]
    wanted, opened = TorchDistReader(root / name / "torch_dist"), open_legacy(root / name / "legacy")
    states = {key.split(".")[2] for key in opened.source.tensors if key.startswith("optimizer.")}
    assert states == {"param", "exp_avg", "exp_avg_sq"}
    assert set(opened.source.tensors) == set(wanted.tensors)
    for key, info in wanted.tensors.items():
        found = opened.source.tensors[key]
        assert (found.shape, found.dtype) == (info.shape, info.dtype), key
        box = tuple((0, size) for size in info.shape)
        assert torch.equal(opened.source.read(key, box), wanted.read(key, box)), key
    assert opened.shape is not None and opened.shape.padded_vocab_size == case.shape.padded_vocab_size
    assert opened.layout == case.layout
    assert opened.common["iteration"] == STEPS and opened.common["args"]["consumed_train_samples"] == 80
    assert {group["step"] for group in opened.common["optimizer"]["optimizer"]["param_groups"]} == {STEPS}
    assert bool(opened.notes) == (case.shape.tied and case.layout.pipeline_model_parallel_size > 1)


def test_a_distributed_optimizer_without_its_file_is_refused(root: Path) -> None:
    path = root / "TP2 distributed fp32" / "legacy"
    kept = (path / "mp_rank_01" / "distrib_optim.pt").rename(path / "aside")
    with pytest.raises(CheckpointError, match=r"mp_rank_01/model_optim_rng\.pt: .*distrib_optim\.pt.*--no-optimizer"):
        open_legacy(path)
    without = open_legacy(path, optimizer=False)
    assert not any(key.startswith("optimizer.") for key in without.source.tensors)
    kept.rename(path / "mp_rank_01" / "distrib_optim.pt")


def test_megatron_core_loads_our_export_strictly_on_every_rank(told: tuple[Path, dict[str, list[Any]]]) -> None:
    for name, (shape, cut) in EXPORTS.items():
        ranks = cut.tensor_model_parallel_size * cut.pipeline_model_parallel_size * cut.expert_model_parallel_size
        assert len(told[1][name]) == ranks
        state = random_state(shape, optimizer=False)
        seen = dict.fromkeys(state, 0)
        for key, offset, values in (shard for rank in told[1][name] for shard in rank):
            sizes = (*[1] * (len(offset) - values.dim()), *values.shape)
            box = tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))
            assert torch.equal(state[key][box].reshape(values.shape), values), (name, key, offset)
            seen[key] += values.numel()
        assert all(seen[key] >= state[key].numel() for key in state), name


def load_exports(root: Path) -> dict[str, list[Any]]:
    """Play every rank of each export in turn: build its model, load its file strictly, return its shards."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megagrow.runtime import reset

    result: dict[str, list[Any]] = {}
    for name, (shape, cut) in EXPORTS.items():
        result[name] = []
        for rank in range(cut.world_size):
            dist.init_process_group("fake", rank=rank, world_size=cut.world_size, store=FakeStore())
            result[name].append(load_export(root / name, shape, cut))
            reset()
            dist.destroy_process_group()
    return result


def load_export(path: Path, shape: ModelShape, cut: ParallelLayout) -> list[Any]:
    """Load what the rank that this process plays has of an export: key, offset and values of each shard."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megagrow.model import build_model

    sizes = {name: size for name, size in cut.groups.items() if name != "data_parallel_size"}
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    chunks = build_model(shape, cut, precision="fp32")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path / rank_directory(cut) / "model_optim_rng.pt", weights_only=True)
    assert isinstance(state["args"], argparse.Namespace) and state["args"].num_layers == shape.num_layers
    shards = []
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{index}"], strict=True)
        sharded = chunk.sharded_state_dict()
        apply_factories(sharded)
        for shard in nested_values(sharded):
            if isinstance(shard, ShardedTensor):
                shards.append((shard.key, shard.global_offset, shard.data.detach().clone()))
    return shards


def rank_directory(cut: ParallelLayout) -> str:
    """Name that Megatron-LM gives this rank's directory."""
    from megatron.core import parallel_state as parallel

    name = f"mp_rank_{parallel.get_tensor_model_parallel_rank():02d}"
    if cut.pipeline_model_parallel_size > 1:
        name += f"_{parallel.get_pipeline_model_parallel_rank():03d}"
    if cut.expert_model_parallel_size > 1:
        name += f"_{parallel.get_expert_model_parallel_rank():03d}"
    return name
