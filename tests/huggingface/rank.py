"""What the tests of Hugging Face checkpoints do in a process with Megatron-Core, all cases in one.

transformers stays outside: what makes Megatron-Core run on CPU is not good for it.
"""

import traceback
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megagrow.checkpoint.formats.huggingface.read import open_huggingface
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.index.index import OpenCheckpoint, Source
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.plan import plan_conversion
from megagrow.convert.targets.huggingface import HuggingFaceTarget
from megagrow.growth.operators.plan import plan_growth
from megagrow.plan.parameters import count_parameters
from tests.huggingface.models import CASES, Case, tokens
from tools.reference.execute import execute
from tools.reference.memory import MemoryStore


def work(payload: str) -> dict[str, dict[str, Any]]:
    """What was found of each case, or its `error`; the payload is the directory with the parents."""
    from megagrow import runtime

    runtime.start(seed=1)
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        try:
            found[name] = _case(case, Path(payload) / name)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found | {"frequencies": _frequencies()}


def export(source: Source, shape: ModelShape, directory: Path, **options: Any) -> HuggingFaceTarget:
    """Write an export as a converter would, in small pieces and files, and return it."""
    production = HuggingFaceTarget(source, shape, **{"shard_bytes": 30_000, "piece_bytes": 1_000} | options)
    directory.mkdir(parents=True)
    for unit, (file,) in enumerate(production.units):
        with open(directory / file.name, "wb") as stream:
            for _, piece in production.produce(unit):
                stream.write(piece)
        assert (directory / file.name).stat().st_size == file.size
    production.finish(directory)
    return production


def _case(case: Case, place: Path) -> dict[str, Any]:
    opened = open_huggingface(place / "parent")
    assert opened.shape is not None
    came = {"remembered": opened.common["huggingface"]}
    again = export(opened.source, opened.shape, place / "again", **came)
    large, store = _grow(opened, opened.shape, case)
    grown = export(store, large, place / "grown", **came)
    fresh = export(store, large, place / "fresh")
    return {
        "logits": _logits(opened.shape, opened.source),
        "grown logits": _logits(large, store),
        "files": len(again.units),
        "grown as": grown.architecture,
        "fresh as": fresh.architecture,
        "parameters": count_parameters(large).total,
    }


def _grow(opened: OpenCheckpoint, small: ModelShape, case: Case) -> tuple[ModelShape, MemoryStore]:
    """The grown shape and its tensors."""
    large = ModelShape(**small.model_dump() | case.larger)
    step = plan_growth(small, large, GrowthConfig(**case.growth), seed=3)
    assert step.exact, step.operators
    store, index = MemoryStore(), opened.source.tensors
    execute(plan_conversion(index, step, ParallelLayout(), DType.FLOAT32), opened.source, store)
    return large, store


def _logits(shape: ModelShape, source: Source) -> Tensor:
    from megagrow.evaluate.live import LiveModel, TensorSource, TokenBatch

    batch = tokens(shape.vocab_size)
    with torch.no_grad():
        return (
            LiveModel(shape, cast(TensorSource, source), "fp32")
            .forward(TokenBatch(batch, batch))
            .logits[..., : shape.vocab_size]
        )


def _frequencies() -> dict[str, Tensor]:
    """Llama 3.2's rotary frequencies, ours and Megatron-Core's."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megagrow.model.attention import Rotary

    scaled = RotaryEmbedding(128, 1.0, rotary_base=500000, rope_scaling=True, rope_scaling_factor=32.0)
    return {"ours": Rotary(128, 500000, 32.0).frequencies(torch.device("cpu")), "megatron": scaled.inv_freq}
