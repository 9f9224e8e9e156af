"""Beside an operator's exactness, every conversion reports what storing its values rounds; and that is what it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.directory import Ancestor, read_manifest
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.index import DType, whole_box
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.plan import ConversionPlan, Recipe, plan_conversion
from megagrow.growth.operators import plan_growth
from megagrow.records import ConversionRecord
from megagrow.report.tables import exactness_text
from tests.reference.command_line import CommandLine, megagrow
from tests.unit.stages.stage_family import large_shape, write_family
from tools.reference.memory import MemoryStore
from tools.reference.tiny_checkpoint import random_state, write_checkpoint

__all__ = ["megagrow"]

COPIED = "exact, bit for bit: values are only copied"
ROUNDED = "exact; stored in bf16, which rounds the grown weights"
NARROW = {"hidden_size": 8}  # to 12: a residual stream scaled by the root of 1.5
BF16, FP32 = torch.bfloat16, torch.float32
# name: (source's shape, type, Adam's state; target's precision; growth; what is said)
CASES: dict[str, tuple[dict[str, Any], torch.dtype, bool, str, list[str], str]] = {
    "nothing grows": ({}, BF16, True, "bf16", [], COPIED),
    "width, scaled": (NARROW, BF16, False, "bf16", [], ROUNDED),
    "width, scaled, with masters": (NARROW, BF16, True, "bf16", [], ROUNDED),
    "width, scaled, in fp32": (NARROW, FP32, True, "fp32", [], "exact; stored in fp32, which rounds the grown weights"),
    "width by 4": ({"hidden_size": 3}, BF16, False, "bf16", [], COPIED + ", or scaled by powers of two"),
    "ffn, padded": ({"ffn_hidden_size": 12}, BF16, False, "bf16", [], COPIED),
    "ffn, halved": (
        {"ffn_hidden_size": 10}, BF16, False, "bf16", ["growth.ffn=balanced"],
        COPIED + ", or scaled by powers of two",
    ),
    "layers": ({"num_layers": 2}, BF16, True, "bf16", [], COPIED),
    "layers, not exact": (
        {"num_layers": 2}, BF16, True, "bf16", ["growth.layer=stack"],
        "does not preserve the function; values are only copied",
    ),
    "cast to fewer bits": (
        {}, FP32, False, "bf16", [], "exact; stored in bf16, which rounds the source's fp32 weights"
    ),
    "cast to more bits": ({}, BF16, False, "fp32", [], COPIED),
    "from the masters": (
        {}, BF16, True, "fp32", [], "exact; stored in fp32 from the masters, which the source's bf16 weights round"
    ),
    "other bits": ({}, BF16, False, "fp16", [], "exact; stored in fp16, which rounds the source's bf16 weights"),
}  # fmt: skip


# issue 12: A6
@pytest.mark.parametrize("name", CASES)
def test_storage_is_reported_wherever_exactness_is(tmp_path: Path, megagrow: CommandLine, name: str) -> None:
    of, dtype, optimizer, precision, growth, expected = CASES[name]
    small, large = large_shape(**of), large_shape()
    source = write_checkpoint(tmp_path / "source", small, random_state(small, optimizer=optimizer, dtype=dtype))
    sizes = [f"model.{name}={getattr(large, name)}" for name in of]
    command = ("convert", source, tmp_path / "t", *sizes, *growth, f"precision={precision}")
    for printed in (megagrow.done(*command, "--dry-run"), megagrow.done(*command)):
        line = next((line for line in printed.splitlines() if expected in line), "")
        assert line.rstrip().endswith((expected, "tensors)")), line
    forecast = json.loads(megagrow.done(*command, "--dry-run", "--json"))
    record = json.loads(megagrow.done(*command, "--json"))
    assert record["storage"] == forecast["storage"] and record["rounded"] == forecast["rounded"]
    assert (record["rounded"] == 0) == (expected.startswith(COPIED) or "values are only copied" in expected)
    assert exactness_text(record["exact"], record["storage"]).startswith(expected)
    inspected = " ".join(megagrow.done("inspect", tmp_path / "t").split())
    assert expected in inspected, inspected
    path = open_checkpoint(tmp_path / "t").source.path  # type: ignore[attr-defined]  # a reader of files
    assert json.loads(megagrow.done("inspect", tmp_path / "t", "--json"))["conversion"] == record
    for ancestor in read_manifest(path).lineage:
        assert ancestor.storage == record["storage"]


# issue 12: A6
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "stack" not in "".join(case[4])])
def test_what_is_not_reported_as_rounded_is_not_rounded(tmp_path: Path, megagrow: CommandLine, name: str) -> None:
    """The written weights are those of the same growth of the same values in fp32, unless rounding is reported."""
    of, dtype, optimizer, precision, growth, expected = CASES[name]
    small, large = large_shape(**of), large_shape()
    state = random_state(small, optimizer=optimizer, dtype=dtype)
    # what the source's function is computed with: its own weights and not the masters
    wide = {key: values.float() for key, values in state.items() if not key.startswith("optimizer.")}
    sizes = [f"model.{name}={getattr(large, name)}" for name in of]
    made = []
    for number, (content, wanted, seed) in enumerate(((state, precision, 1), (wide, "fp32", 1), (wide, "fp32", 2))):
        source = write_checkpoint(tmp_path / f"source{number}", small, content)
        out = tmp_path / f"target{number}"
        settings = [*sizes, *growth, f"precision={wanted}", f"seed={seed}"]
        megagrow.done("convert", source, out, *settings, "--no-optimizer")
        reader = open_checkpoint(out).source
        made.append({key: reader.read(key, whole_box(info.shape)).double() for key, info in reader.tensors.items()})
    one, other, reseeded = made
    # what depends on the seed is new, and no value of the source's
    equal = all(
        torch.equal(one[key][same], other[key][same]) for key in other for same in [other[key] == reseeded[key]]
    )
    if COPIED in expected:
        assert equal
    elif name not in (
        "other bits",
        "width, scaled, in fp32",
    ):  # whose loss these values, or this reference, do not show
        assert not equal


# issue 12: A6
@pytest.mark.parametrize(("to", "precision"), [("huggingface", "bf16"), ("legacy", "bf16"), ("legacy", "fp32")])
def test_an_export_says_it_as_well(tmp_path: Path, megagrow: CommandLine, to: str, precision: str) -> None:
    source = write_checkpoint(tmp_path / "source", large_shape(), random_state(large_shape(), optimizer=False))
    expected = "exact; stored in bf16, which rounds the source's fp32 weights" if precision == "bf16" else COPIED
    command = ("convert", write_family(tmp_path, large_shape(), precision=precision), "--stage", "grown")
    export = ("--source", source, "--to", to, "--save", tmp_path / "out")
    assert f"{to}; {expected}" in megagrow.done(*command, *export)
    told = json.loads(megagrow.done(*command, *export, "--overwrite", "--json"))
    assert exactness_text(True, told["storage"]).startswith(expected) and (told["rounded"] > 0) == (precision == "bf16")


# issue 12: A6
def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    content = {
        "kind": "conversion", "time": 1.0, "source": "a", "target": "b", "operators": {}, "moments": "exact",
        "exact": True, "tensors": 1, "bytes_read": 1, "bytes_written": 1, "seconds": 1.0,
    }  # fmt: skip
    record = ConversionRecord.model_validate_json(json.dumps(content))
    assert record.storage is None and exactness_text(record.exact, record.storage) == "exact"
    assert "storage" in Ancestor.model_fields and not Ancestor.model_fields["storage"].is_required()


# issue 12: A6
def test_a_plan_tells_which_tensors_are_only_copied() -> None:
    small, large = large_shape(ffn_hidden_size=12), large_shape()
    step = plan_growth(small, large, GrowthConfig(), seed=1)
    index = MemoryStore(random_state(small, optimizer=False)).tensors
    plan: ConversionPlan = plan_conversion(index, step, ParallelLayout(), DType.FLOAT32)
    grown = {task.kind.key.rpartition("mlp.")[2] for task in plan.tasks if task.recipe is not Recipe.COPY}
    assert grown == {"linear_fc1.weight", "linear_fc2.weight"} and plan.storage.rounded == 0
