"""Planning, inspecting and copying work where torch cannot be imported, and give the same bytes as with torch."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.checkpoint.index.box import whole_box
from megagrow.checkpoint.index.dtypes import DType
from megagrow.config.target import target_of
from megagrow.convert.early import Warmup
from megagrow.convert.make import maker
from megagrow.convert.make.copier import Copier
from megagrow.convert.make.grower import Grower
from megagrow.convert.plan import Recipe, plan
from megagrow.convert.plan.plan import plan_conversion
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.convert.targets.huggingface import HuggingFaceTarget
from megagrow.convert.work import RunOptions
from megagrow.growth.operators.plan import plan_growth
from tests.unit.huggingface.test_huggingface import SHAPES, random_store, write
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

ROOT = Path(__file__).parents[3]
STACK = ("model.num_layers=4", "growth.layer=stack")


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch fails, in workers too."""
    block = tmp_path / "block" / "torch"
    block.mkdir(parents=True)
    (block / "__init__.py").write_text("raise ImportError('torch is not here')\n")
    return {**os.environ, "PYTHONPATH": f"{block.parent}{os.pathsep}{ROOT}"}


def run(environment: dict[str, str], *arguments: object, code: int = 0) -> str:
    line = [sys.executable, "-m", "megagrow", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def with_torch(monkeypatch: pytest.MonkeyPatch, source: Path, save: Path) -> Path:
    """The same conversion with all values passing through torch's tensors: nothing is planned as a copy."""
    monkeypatch.setattr(plan, "keeps_values", lambda kind, step: False)
    opened = open_checkpoint(source)
    assert opened.shape is not None
    known: dict[str, Any] = {"precision": "bf16", "parallel": {}, "source": opened.shape.model_dump()}
    wanted = target_of(known, list(STACK))
    target = TargetSpec(wanted.stage, wanted.model, wanted.parallel, wanted.growth, wanted.precision, wanted.seed)
    return Path(convert_checkpoint(source, save, target, RunOptions(memory=8 << 30)).target)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_layers_are_stacked_without_torch_to_the_same_bytes(
    name: str, tmp_path: Path, no_torch: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES[name], torch.bfloat16), SHAPES[name]), tmp_path / "source")
    output = run(no_torch, "convert", source, tmp_path / "bare", *STACK, "--workers", 2)
    assert "layer stack" in output
    bare, full = tmp_path / "bare" / "iter_0000000", with_torch(monkeypatch, source, tmp_path / "full")
    data = sorted(file.name for file in full.glob("*.distcp"))
    assert data and all((bare / file).read_bytes() == (full / file).read_bytes() for file in data)
    assert (bare / ".metadata").read_bytes() == (full / ".metadata").read_bytes()
    assert "bf16" in run(no_torch, "inspect", bare)
    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(bare / "common.pt", weights_only=True)
    assert common["args"].params_dtype is torch.bfloat16 and common["args"].num_layers == 4


def test_an_import_is_exported_again_without_torch(tmp_path: Path, no_torch: dict[str, str]) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES["llama"]), SHAPES["llama"]), tmp_path / "source")
    run(no_torch, "convert", source, tmp_path / "megatron")
    run(no_torch, "convert", tmp_path / "megatron", tmp_path / "again", "--to", "huggingface", "--workers", 2)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_a_computing_conversion_fails_without_torch_and_leaves_nothing(
    tmp_path: Path, no_torch: dict[str, str]
) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES["llama"]), SHAPES["llama"]), tmp_path / "source")
    assert "torch is not here" in run(no_torch, "convert", source, tmp_path / "t", "model.ffn_hidden_size=40", code=1)
    assert not (tmp_path / "t").exists()


def test_inspect_works_without_torch(tmp_path: Path, no_torch: dict[str, str]) -> None:
    of = shape(SMALL)
    output = run(no_torch, "inspect", write_checkpoint(tmp_path / "source", of, random_state(of)), "--tensors")
    assert "with Adam's state" in output and "float32" in output


@pytest.mark.parametrize(("to", "precision", "needed"), [("huggingface", "fp32", False), ("huggingface", "bf16", True),
                                                         ("legacy", "fp32", True)])  # fmt: skip
def test_memory_is_measured_after_everything_is_imported(to: str, precision: str, needed: bool, tmp_path: Path) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES["llama"]), SHAPES["llama"]), tmp_path / "source")
    program = f"""
import sys
from pathlib import Path
from megagrow.convert.run.export import order_export
from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.convert.targets.choose import plan_target
from megagrow.config import ParallelLayout
opened = open_checkpoint(Path({str(source)!r}))
order = order_export(Path({str(source)!r}), {to!r}, {precision!r}, ParallelLayout(), opened.shape, None)
plan_target(order, opened, lambda: print("torch" in sys.modules) or 1 << 16)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert output == f"{needed}\n"


def test_the_rows_of_a_router_are_copied_without_torch() -> None:
    store = random_store(SHAPES["mixtral"])
    known: dict[str, Any] = {"precision": "fp32", "parallel": {}, "source": SHAPES["mixtral"].model_dump()}
    wanted = target_of(known, list(STACK))
    step = plan_growth(wanted.source, wanted.model, wanted.growth, wanted.seed)
    conversion = plan_conversion(store.tensors, step, wanted.parallel, DType.FLOAT32)
    assert isinstance(maker.maker_of(conversion, store), Copier)


def test_copied_columns_equal_grown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rms_copy` only repeats columns of the embedding; the copier gives the same bits as torch."""
    store = random_store(SHAPES["llama"])
    known: dict[str, Any] = {"precision": "fp32", "parallel": {}, "source": SHAPES["llama"].model_dump()}
    wanted = target_of(known, ["model.hidden_size=24", "model.kv_channels=6", "growth.hidden=rms_copy"])
    step = plan_growth(wanted.source, wanted.model, wanted.growth, wanted.seed)
    copied = plan_conversion(store.tensors, step, wanted.parallel, DType.FLOAT32)
    monkeypatch.setattr(plan, "keeps_values", lambda kind, step: False)
    grown = plan_conversion(store.tensors, step, wanted.parallel, DType.FLOAT32)
    assert {task.recipe for task in grown.tasks} == {Recipe.GROW} and grown.needs_torch
    compared = set()
    for copy, growth in zip(copied.tasks, grown.tasks, strict=True):
        if copy.recipe is Recipe.COPY:
            box = whole_box(copy.kind.layer_shape(step.large))
            (piece,), (other,) = Copier(copied, store).pieces(copy, box), Grower(grown, store).pieces(growth, box)
            assert piece.dtype == other.dtype and np.array_equal(piece.values, other.values), copy.kind.key
            compared.add(copy.kind.key)
    assert "embedding.word_embeddings.weight" in compared


def test_only_the_part_that_was_read_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    store, forgotten = random_store(SHAPES["llama"]), []
    monkeypatch.setattr(store, "forget", lambda key, box: forgotten.append((key, box)))
    known: dict[str, Any] = {"precision": "fp32", "parallel": {}, "source": SHAPES["llama"].model_dump()}
    wanted = target_of(known, list(STACK))
    step = plan_growth(wanted.source, wanted.model, wanted.growth, wanted.seed)
    conversion = plan_conversion(store.tensors, step, wanted.parallel, DType.FLOAT32)
    task = next(task for task in conversion.tasks if task.kind.key == "embedding.word_embeddings.weight")
    rows, columns = task.kind.layer_shape(step.large)
    for part in ((0, 20), (20, rows), (0, rows)):
        list(Copier(conversion, store).pieces(task, (part, (0, columns))))
        assert forgotten.pop() == (task.kind.key, (part, (0, columns)))


def test_a_warmup_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Warmup(3) as warmup:
        warmup.begin(tmp_path)
        processes, readahead = warmup._pool._processes, warmup._readahead
        assert len(processes) == 2 and all(process.poll() is None for process in processes)
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in processes)
    assert readahead is not None and readahead._ended.is_set()


def test_a_warmup_begins_only_once_and_with_a_directory(tmp_path: Path) -> None:
    with Warmup() as warmup:
        warmup.begin(tmp_path / "family.yaml")
        before, processes = warmup._readahead, warmup._pool._processes
        assert before is None and not processes
        warmup.begin(tmp_path)
        first = warmup._readahead
        warmup.begin(tmp_path)
        assert first is not None and warmup._readahead is first


def test_a_warmup_imports_nothing_large() -> None:
    program = "import sys, megagrow.convert.early; print({'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


def test_workers_import_torch_on_demand() -> None:
    with Warmup(2) as warmup:
        maps = Path(f"/proc/{warmup._pool._processes[0].pid}/maps")
        time.sleep(1.0)
        assert "libtorch" not in maps.read_text()
        warmup.import_torch()
        warmup.import_torch()
        for _ in range(300):
            if "libtorch" in maps.read_text():
                return
            time.sleep(0.1)
        raise AssertionError("no worker imported torch")
