"""What only plans, looks and copies works where torch cannot be imported, and gives the bytes that it gives with it."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.checkpoint.index.dtypes import DType
from megagrow.cli.checkpoint.early import early
from megagrow.config.target import target_of
from megagrow.convert.make import maker
from megagrow.convert.make.copier import Copier
from megagrow.convert.plan.plan import plan_conversion
from megagrow.convert.run import convert
from megagrow.convert.targets import choose
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
    """The same conversion with its values passing through tensors."""
    for module in (maker, convert, choose):
        monkeypatch.setattr(module, "is_copy", lambda conversion, source: False)
    opened = open_checkpoint(source)
    assert opened.shape is not None
    known: dict[str, Any] = {"precision": "bf16", "parallel": {}, "source": opened.shape.model_dump()}
    wanted = target_of(known, list(STACK))
    aim = convert.TargetSpec(wanted.stage, wanted.model, wanted.parallel, wanted.growth, wanted.precision, wanted.seed)
    return Path(convert.convert_checkpoint(source, save, aim, RunOptions(memory=8 << 30)).target)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_layers_are_stacked_without_torch_to_the_same_bytes(
    name: str, tmp_path: Path, no_torch: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES[name], torch.bfloat16), SHAPES[name]), tmp_path / "source")
    told = run(no_torch, "convert", source, tmp_path / "bare", *STACK, "--workers", 2)
    assert "layer stack" in told
    bare, full = tmp_path / "bare" / "iter_0000000", with_torch(monkeypatch, source, tmp_path / "full")
    data = sorted(file.name for file in full.glob("*.distcp"))
    assert data and all((bare / file).read_bytes() == (full / file).read_bytes() for file in data)
    assert (bare / ".metadata").read_bytes() == (full / ".metadata").read_bytes()
    assert "bf16" in run(no_torch, "inspect", bare)
    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(bare / "common.pt", weights_only=True)
    assert common["args"].params_dtype is torch.bfloat16 and common["args"].num_layers == 4


def test_an_import_goes_out_again_without_torch(tmp_path: Path, no_torch: dict[str, str]) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES["llama"]), SHAPES["llama"]), tmp_path / "source")
    run(no_torch, "convert", source, tmp_path / "megatron")
    run(no_torch, "convert", tmp_path / "megatron", tmp_path / "again", "--to", "huggingface", "--workers", 2)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_what_computes_says_what_it_lacks_and_leaves_nothing(tmp_path: Path, no_torch: dict[str, str]) -> None:
    source = write(HuggingFaceTarget(random_store(SHAPES["llama"]), SHAPES["llama"]), tmp_path / "source")
    assert "torch is not here" in run(no_torch, "convert", source, tmp_path / "t", "model.ffn_hidden_size=40", code=1)
    assert not (tmp_path / "t").exists()


def test_arguments_and_types_are_looked_at_without_torch(tmp_path: Path, no_torch: dict[str, str]) -> None:
    of = shape(SMALL)
    told = run(no_torch, "inspect", write_checkpoint(tmp_path / "source", of, random_state(of)), "--tensors")
    assert "with Adam's state" in told and "float32" in told


@pytest.mark.parametrize(("to", "precision", "needed"), [("huggingface", "fp32", False), ("huggingface", "bf16", True),
                                                         ("legacy", "fp32", True)])  # fmt: skip
def test_memory_is_measured_with_all_that_will_be_imported(
    to: str, precision: str, needed: bool, tmp_path: Path
) -> None:
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
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert told == f"{needed}\n"


def test_the_rows_of_a_router_are_copied_too() -> None:
    store = random_store(SHAPES["mixtral"])
    known: dict[str, Any] = {"precision": "fp32", "parallel": {}, "source": SHAPES["mixtral"].model_dump()}
    wanted = target_of(known, list(STACK))
    step = plan_growth(wanted.source, wanted.model, wanted.growth, wanted.seed)
    conversion = plan_conversion(store.tensors, step, wanted.parallel, DType.FLOAT32)
    assert isinstance(maker.maker_of(conversion, store), Copier)


def test_a_part_of_a_tensor_is_forgotten_without_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_was_begun_early_ends_with_the_verb(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), early(tmp_path, 3) as (crew, ahead):
        assert crew is not None and ahead is not None
        processes = crew._processes
        assert len(processes) == 2 and all(process.poll() is None for process in processes)
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in processes)
    assert ahead is not None and ahead._ended.is_set()
    with early(tmp_path / "family.yaml", 1) as begun:
        assert begun == (None, None)


def test_workers_import_torch_when_they_are_told_to() -> None:
    with early(Path("family.yaml"), 2) as (crew, _):
        assert crew is not None
        maps = Path(f"/proc/{crew._processes[0].pid}/maps")
        time.sleep(1.0)
        assert "libtorch" not in maps.read_text()
        crew.warm()
        crew.warm()
        for _ in range(300):
            if "libtorch" in maps.read_text():
                return
            time.sleep(0.1)
        raise AssertionError("no worker imported torch")
