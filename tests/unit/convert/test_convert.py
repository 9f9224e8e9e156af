"""A whole conversion on disk: equal to one in memory, all or nothing, recorded, described and bit-exact."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.directory import integrity, iterations
from megagrow.checkpoint.directory.manifest import read_manifest
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.proof.verify import verify
from megagrow.checkpoint.tensors.growth_record import axis_runs, read_growth_record
from megagrow.checkpoint.tensors.table import extra_state_keys, optimizer_key, tensor_kinds
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.plan import plan_conversion
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.convert.work.disk import OutputStream
from megagrow.errors import CheckpointError, GrowthError
from megagrow.growth.maps.axis import NO_SOURCE, AxisMap
from megagrow.growth.operators.plan import plan_growth
from megagrow.tracker import TRACKER
from tools.reference.execute import execute
from tools.reference.memory import MemoryStore
from tools.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint

TP2 = ParallelLayout(tensor_model_parallel_size=2)
WORD = "embedding.word_embeddings.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "small", shape(SMALL), random_state(shape(SMALL)))


def target(sizes: dict[str, int] = LARGE, layout: ParallelLayout = TP2, **others: Any) -> TargetSpec:
    defaults: dict[str, Any] = {"stage": "large", "growth": GrowthConfig(), "precision": "fp32", "seed": 7}
    return TargetSpec(shape=shape(sizes), layout=layout, **defaults | others)


def read_all(path: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(path)
    return {key: reader.read_whole(key) for key in reader.tensors}


def in_memory(state: dict[str, Tensor], small: ModelShape, wanted: TargetSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    store, grown = MemoryStore(state), MemoryStore()
    step = plan_growth(small, wanted.shape, wanted.growth, wanted.seed)
    execute(plan_conversion(store.tensors, step, ParallelLayout(), DType.of(dtype)), store, grown)
    return grown.values


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("growth", [GrowthConfig(), GrowthConfig(hidden="balanced", ffn="balanced", head="balanced")])
@pytest.mark.parametrize("moments", ["exact", "copy", "asymmetric", "reset"])
def test_a_conversion_on_disk_equals_one_in_memory(
    source: Path, tmp_path: Path, growth: GrowthConfig, moments: str
) -> None:
    wanted = target(growth=growth.model_copy(update={"moments": moments}))
    seen: list[tuple[int, int]] = []
    record = convert_checkpoint(
        source, tmp_path / "large", wanted, progress=lambda done, total: seen.append((done, total))
    )
    path = tmp_path / "large" / "iter_0000000"
    found, expected = read_all(path), in_memory(read_all(source), shape(SMALL), wanted, torch.float32)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert iterations.read_tracker(tmp_path / "large") == 0
    assert verify(path, parent=source).faults == []
    assert set(TorchDistReader(path).objects) == set(extra_state_keys(wanted.shape))
    assert seen[-1] == (record.bytes_written, record.bytes_written) and seen == sorted(seen)
    assert record.tensors == sum(
        wanted.shape.num_layers if kind.per_layer else 1 for kind in tensor_kinds(wanted.shape)
    )
    assert record.moments == moments and record.exact
    assert record.bytes_written == sum(file.stat().st_size for file in path.glob("__*_[0-9]*.distcp"))
    step = TorchDistReader(path).common()["optimizer"]["optimizer"]["param_groups"][0]["step"]
    assert step == (0 if moments == "reset" else 10) and TorchDistReader(path).common()["iteration"] == 0


def test_chunks_are_cut_for_the_ranks_that_will_read_them(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "large", target())
    tensors = TorchDistReader(tmp_path / "large" / "iter_0000000").tensors
    cut = {key: {stop - start for start, stop in (chunk.box[1] for chunk in tensors[key].chunks)} for key in (FC1,)}
    assert cut == {FC1: {LARGE["ffn_hidden_size"] // 2}}  # gate and up of two ranks
    assert len(tensors[FC1].chunks) == 4 * LARGE["num_layers"]
    assert sorted(chunk.box[0] for chunk in tensors[WORD].chunks) == [(0, 15), (15, 30)]
    assert len(tensors["decoder.final_layernorm.weight"].chunks) == 1


def test_bf16_weights_grow_from_their_masters(tmp_path: Path) -> None:
    state = random_state(shape(SMALL), dtype=torch.bfloat16)
    source = write_checkpoint(tmp_path / "small", shape(SMALL), state)
    convert_checkpoint(source, tmp_path / "large", target(precision="bf16", growth=GrowthConfig(hidden="balanced")))
    grown = read_all(tmp_path / "large" / "iter_0000000")
    for kind in tensor_kinds(shape(LARGE)):
        weights, master = grown[kind.key], grown[optimizer_key("param", kind.key)]
        assert weights.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(weights, master.to(torch.bfloat16)), kind.key
    old = grown[optimizer_key("param", WORD)][:, :8]
    assert not torch.equal(old, old.to(torch.bfloat16).float()), "masters came from rounded weights"


def test_bf16_weights_without_optimizer_grow_as_they_are(tmp_path: Path) -> None:
    state = random_state(shape(SMALL), optimizer=False, dtype=torch.bfloat16)
    source = write_checkpoint(tmp_path / "small", shape(SMALL), state)
    convert_checkpoint(source, tmp_path / "large", target(precision="bf16"))
    found = read_all(tmp_path / "large" / "iter_0000000")
    assert set(found) == {kind.key for kind in tensor_kinds(shape(LARGE))}
    scaled = (state[WORD].float() * (12 / 8) ** 0.5).to(torch.bfloat16)
    assert torch.equal(found[WORD][:, :8], scaled) and not found[WORD][:, 8:].any()
    assert not read_manifest(tmp_path / "large" / "iter_0000000").optimizer


def test_resharding_keeps_iteration_position_and_every_bit(source: Path, tmp_path: Path) -> None:
    record = convert_checkpoint(source, tmp_path / "again", target(SMALL, stage="small"))
    path = tmp_path / "again" / "iter_0000010"
    before, after = read_all(source), read_all(path)
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    old, new = read_manifest(source), read_manifest(path)
    assert new == old.model_copy(update={"layout": TP2}) and new.iteration == 10
    before_common, after_common = TorchDistReader(source).common(), TorchDistReader(path).common()
    assert {key: after_common[key] for key in before_common} == before_common
    assert set(after_common) - set(before_common) == {
        "args", "checkpoint_version", "num_floating_point_operations_so_far",
    }  # fmt: skip
    assert record.operators == {} and record.exact and read_growth_record(path) is None
    assert iterations.read_tracker(tmp_path / "again") == 10
    assert len(TorchDistReader(path).tensors[FC1].chunks) == 2 * len(TorchDistReader(source).tensors[FC1].chunks) * 2


def test_a_repeated_conversion_is_made_once(source: Path, tmp_path: Path) -> None:
    first = convert_checkpoint(source, tmp_path / "large", target())
    before = files_of(tmp_path / "large" / "iter_0000000")
    assert convert_checkpoint(source, tmp_path / "large", target()) == first
    assert files_of(tmp_path / "large" / "iter_0000000") == before
    assert sorted(file.name for file in (tmp_path / "large").iterdir()) == ["iter_0000000", TRACKER]


def test_a_tracker_missing_after_a_kill_is_repaired(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "large", target())
    (tmp_path / "large" / TRACKER).unlink()
    convert_checkpoint(source, tmp_path / "large", target())
    assert iterations.read_tracker(tmp_path / "large") == 0


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 8},
        {"growth": GrowthConfig(hidden="balanced")},
        {"growth": GrowthConfig(moments="reset")},
        {"layout": ParallelLayout()},
        {"precision": "bf16"},
        {"sizes": {**LARGE, "ffn_hidden_size": 22}},
        {"stage": "larger"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_target_is_not_written_over(source: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    convert_checkpoint(source, tmp_path / "large", target())
    before = files_of(tmp_path / "large" / "iter_0000000")
    with pytest.raises(
        CheckpointError, match="iter_0000000: another checkpoint already exists here; it is not touched"
    ):
        convert_checkpoint(source, tmp_path / "large", target(**other))
    assert files_of(tmp_path / "large" / "iter_0000000") == before


def test_a_stage_that_was_trained_further_is_not_set_back(source: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    write_checkpoint(large, shape(LARGE), random_state(shape(LARGE)), iteration=50)
    with pytest.raises(CheckpointError, match="'large' is already at iteration 50; it is not touched"):
        convert_checkpoint(source, large, target())
    assert iterations.published(large) == [50] and iterations.read_tracker(large) == 50


@pytest.mark.parametrize("after", [0, 5, 20])
@pytest.mark.parametrize("kind", ["disk", "interrupt", "bug"])
def test_a_failure_in_the_middle_publishes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, kind: str
) -> None:
    errors = {
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "interrupt": KeyboardInterrupt("stop"),
        "bug": KeyError("x"),
    }
    seen = {
        "disk": (CheckpointError, "the disk is full; nothing of the new checkpoint is kept"),
        "interrupt": (KeyboardInterrupt, "stop"),
        "bug": (KeyError, "x"),
    }
    count, write, before = 0, OutputStream.write, files_of(source)

    def fail_later(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise errors[kind]
        write(self, *arguments)

    monkeypatch.setattr(OutputStream, "write", fail_later)
    with pytest.raises(seen[kind][0], match=seen[kind][1]):
        convert_checkpoint(source, tmp_path / "large", target())
    left = [entry.name for entry in tmp_path.glob("large*/.*")]
    assert left == ([] if kind == "disk" else [".iter_0000000.converting"]) and files_of(source) == before
    assert kind != "disk" or not (tmp_path / "large").exists()
    with pytest.raises(CheckpointError, match="no such checkpoint|incomplete"):
        TorchDistReader(iterations.conversion_staging(tmp_path / "large" / "iter_0000000"))
    monkeypatch.undo()
    convert_checkpoint(source, tmp_path / "large", target())
    assert verify(tmp_path / "large" / "iter_0000000", parent=source).faults == []


def test_leftovers_of_a_kill_are_removed(source: Path, tmp_path: Path) -> None:
    staging = iterations.new_staging(iterations.iteration_path(tmp_path / "large", 0))
    (staging / "__0_0.distcp").write_bytes(b"half")
    convert_checkpoint(source, tmp_path / "large", target())
    assert not staging.exists() and iterations.published(tmp_path / "large") == [0]


def test_a_source_that_is_not_of_its_shape_is_refused(tmp_path: Path) -> None:
    state = random_state(shape(SMALL))
    cases = {
        "without": ({key: value for key, value in state.items() if key != FC1}, f"1 tensors are missing, first {FC1}"),
        "with": ({**state, "mystery.weight": torch.ones(3)}, "1 tensors that this shape does not have, first mystery"),
        "wide": ({**state, WORD: torch.ones(30, 9)}, rf"{WORD} has shape \(30, 9\), the model's is \(30, 8\)"),
        "half": ({key: value for key, value in state.items() if "exp_avg_sq" not in key}, "tensors are missing"),
    }
    for name, (changed, message) in cases.items():
        source = write_checkpoint(tmp_path / name, shape(SMALL), changed)
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_checkpoint(source, tmp_path / "large", target())
        assert str(source) in str(caught.value) and not (tmp_path / "large").exists()
        assert any(str(fault) in str(caught.value) for fault in verify(source).faults)


def test_an_impossible_step_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match="no operator 'stak'; did you mean stack"):
        convert_checkpoint(source, tmp_path / "large", target(growth=GrowthConfig(layer="stak")))
    assert not (tmp_path / "large").exists()


def test_lineage_over_two_steps(source: Path, tmp_path: Path) -> None:
    middle, largest = tmp_path / "middle", tmp_path / "largest"
    convert_checkpoint(source, middle, target(stage="middle"))
    growth = GrowthConfig(hidden="balanced", moments="exact")
    sizes = {**LARGE, "hidden_size": 17, "num_layers": 5}
    convert_checkpoint(middle / "iter_0000000", largest, target(sizes, stage="largest", growth=growth))
    manifest = read_manifest(largest / "iter_0000000")
    first, second = manifest.lineage
    assert (first.stage, first.iteration, first.shape) == ("small", 10, shape(SMALL))
    assert (second.stage, second.iteration, second.shape) == ("middle", 0, shape(LARGE))
    assert set(first.operators) == {"hidden", "ffn", "head", "layer"} and first.moments == "asymmetric"
    assert second.operators == {"hidden": "balanced", "layer": "identity"} and second.moments == "exact"
    assert first.sha256 == integrity.fingerprint(source) != second.sha256
    assert manifest.position == {"corpus": 80} and manifest.consumed_tokens == 640 and manifest.flops == 0
    assert verify(largest / "iter_0000000", parent=middle / "iter_0000000").faults == []
    (fault,) = verify(largest / "iter_0000000", parent=source).faults
    assert "and" in fault and "is another" in fault and str(source) in fault
    (fault,) = verify(source, parent=source).faults
    assert "was not grown; it has no parent" in fault


# The growth record


@pytest.mark.parametrize("operator", ["zero_pad", "balanced"])
def test_the_growth_record_agrees_with_the_maps(source: Path, tmp_path: Path, operator: str) -> None:
    wanted = target(growth=GrowthConfig(hidden=operator, ffn=operator, head=operator))
    convert_checkpoint(source, tmp_path / "large", wanted)
    content = read_growth_record(tmp_path / "large" / "iter_0000000")
    assert content is not None
    step = plan_growth(shape(SMALL), wanted.shape, wanted.growth, wanted.seed)
    axes = {"hidden": step.hidden, "ffn": step.ffn, "head": step.heads.head, "group": step.heads.group}
    for name, axis in axes.items():
        flags = [np.full(run["stop"] - run["start"], run["new"]) for run in content["axes"][name]["runs"]]
        assert np.array_equal(np.concatenate(flags), axis.new), name
        assert np.array_equal(_sources(content["axes"][name]), axis.source), name
    assert content["layers"]["new"] == list(step.layers.new) and content["layers"]["source"] == list(step.layers.source)
    assert set(content["tensors"]) == {kind.key for kind in tensor_kinds(wanted.shape)}
    assert (tmp_path / "large" / "iter_0000000" / "growth.json").stat().st_size < 10_000


def _sources(axis: dict[str, Any]) -> np.ndarray:
    source = np.full(axis["to"], NO_SOURCE)
    for run in axis["runs"]:
        if run["source"] is not None:
            source[run["start"] : run["stop"]] = run["source"] + np.arange(run["stop"] - run["start"])
    return source


def test_runs_break_where_source_or_newness_does() -> None:
    source = np.array([0, 1, 1, 2, NO_SOURCE, NO_SOURCE, 0, 1])
    new = np.array([False, False, True, True, True, False, False, False])
    axis = AxisMap(size=3, source=source, new=new, share=np.ones(8), scale={}, fill={})
    found = [(run["start"], run["stop"], run["source"], run["new"]) for run in axis_runs(axis)]
    assert found == [(0, 2, 0, False), (2, 4, 1, True), (4, 5, None, True), (5, 6, None, False), (6, 8, 0, False)]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format": 2})])
def test_a_damaged_growth_record_is_named_in_the_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "growth.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"growth\.json"):
        read_growth_record(tmp_path)
