"""Planning 70 B parameters takes a second and reads no data; number and size of the planned files are bounded."""

import math
import time

import pytest

from megagrow.checkpoint.index.box import volume, whole_box
from megagrow.checkpoint.index.cover import check_cover
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.index.index import Chunk, TensorInfo
from megagrow.checkpoint.tensors.inventory import check_tensors
from megagrow.checkpoint.tensors.table import OPTIMIZER_STATES, optimizer_key, tensor_kinds
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.plan import ConversionPlan, plan_conversion
from megagrow.convert.plan.tiling import MAX_UNIT_BYTES
from megagrow.convert.targets.torch_dist import TorchDistTarget
from megagrow.growth.operators.plan import plan_growth

LLAMA = {
    "num_query_groups": 8, "kv_channels": 128, "vocab_size": 128256, "seq_length": 8192, "rotary_base": 500000,
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
SMALL = ModelShape(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, **LLAMA)
LARGE = ModelShape(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, **LLAMA)
LAYOUTS = {
    "one rank": (1, 1, 1),
    "TP8 PP4": (8, 4, 1),
    "TP4 PP8 DP2": (4, 8, 2),
    "TP8 PP10 DP4": (8, 10, 4),
}
BYTES_A_PARAMETER = 2 + 3 * 4
SECONDS = 2.0


def index_of(shape: ModelShape) -> dict[str, TensorInfo]:
    """The index of a checkpoint in bf16 with Adam's state, without data."""
    found = {}
    for kind in tensor_kinds(shape):
        of = kind.global_shape(shape)
        states = [(kind.key, DType.BFLOAT16)]
        states += [(optimizer_key(state, kind.key), DType.FLOAT32) for state in OPTIMIZER_STATES]
        for key, dtype in states:
            chunk = Chunk(whole_box(of), "nowhere.distcp", 0, math.prod(of) * dtype.itemsize)
            found[key] = TensorInfo(of, dtype, (chunk,))
    return found


def parameters(shape: ModelShape) -> int:
    return sum(math.prod(kind.global_shape(shape)) for kind in tensor_kinds(shape))


def layout(name: str) -> ParallelLayout:
    tensor, pipeline, data = LAYOUTS[name]
    return ParallelLayout(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, data_parallel_size=data
    )


def planned(name: str) -> tuple[ConversionPlan, TorchDistTarget]:
    step = plan_growth(SMALL, LARGE, GrowthConfig(), 1)
    conversion = plan_conversion(index_of(SMALL), step, layout(name), DType.BFLOAT16)
    return conversion, TorchDistTarget(conversion, None)


def test_four_plans_from_8_b_to_70_b_in_two_seconds() -> None:
    assert (parameters(SMALL) / 1e9, parameters(LARGE) / 1e9) == pytest.approx((8.03, 70.55), abs=0.01)
    started = time.process_time()
    plans = [planned(name) for name in LAYOUTS]
    seconds = time.process_time() - started
    assert len(plans) == len(LAYOUTS) and seconds < SECONDS, f"{seconds:.2f} s of CPU"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_holds_every_value_once_in_files_of_bounded_size(name: str) -> None:
    conversion, target = planned(name)
    files = [file for unit in target.units for file in unit]
    world = layout(name).world_size // layout(name).data_parallel_size
    names = [file.name for file in files]
    assert len(set(names)) == len(names), "two units write the same file"
    ranks = {int(name.split("_")[2]) for name in names}
    assert len(ranks) == world, "each rank reads files of its own"
    values = BYTES_A_PARAMETER * parameters(LARGE)
    total = sum(file.size for file in files)
    assert 0 < total - values < 1024 * sum(1 for _ in target.chunks), "a header is less than 1 KiB"
    per_unit = [sum(file.size for file in unit) for unit in target.units]
    assert max(per_unit) <= 2 * MAX_UNIT_BYTES, (
        "a unit is closed once it is full, and no matrix of a layer is larger than a unit"
    )
    assert total / (2 * MAX_UNIT_BYTES) <= len(per_unit) <= total / MAX_UNIT_BYTES
    assert len(files) <= 2 * 2 * layout(name).tensor_model_parallel_size * len(per_unit), (
        "weights and state of at most two pipeline stages"
    )
    assert conversion.bytes_read == 12 * parameters(SMALL), "masters and moments, once each"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_planned_chunks_cover_every_tensor_once(name: str) -> None:
    _, target = planned(name)
    found: dict[str, list[Chunk]] = {}
    last: dict[tuple[int, int], int] = {}
    for placed in target.chunks:
        assert last.get((placed.unit, placed.file), 0) == placed.offset, "no gaps, in the order of the file"
        last[placed.unit, placed.file] = placed.offset + placed.length
        assert volume(placed.box) * placed.dtype.itemsize < placed.length
        chunk = Chunk(placed.box, target.file(placed).name, placed.offset, placed.length, archive=True)
        found.setdefault(placed.key, []).append(chunk)
    for (unit, file), end in last.items():
        assert target.units[unit][file].size == end
    shapes = {kind.key: kind.global_shape(LARGE) for kind in tensor_kinds(LARGE)}
    shapes |= {optimizer_key(state, key): shape for state in OPTIMIZER_STATES for key, shape in shapes.items()}
    assert set(found) == set(shapes)
    for key, chunks in found.items():
        check_cover(key, TensorInfo(shapes[key], DType.FLOAT32, tuple(chunks)))


def test_the_index_of_shapes_is_accepted() -> None:
    check_tensors(index_of(SMALL), SMALL, optimizer=True)
