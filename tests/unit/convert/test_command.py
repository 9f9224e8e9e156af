"""The command line `convert` from directory to directory, and the scripts under Megatron's names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.proof.diff import compare_checkpoints
from megagrow.cli.checkpoint.conversion_options import parse_bytes
from megagrow.config import ModelShape
from megagrow.config.target import target_of
from megagrow.errors import ConfigError
from tools.checkpoint import checkpoint_inspector
from tools.checkpoint import convert as megatron_convert
from tools.reference.tiny_checkpoint import SMALL, random_state, write_checkpoint
from tools.reference.tiny_checkpoint import shape as shape_of

ROOT = Path(__file__).parents[3]
TP2 = "parallel.tensor_model_parallel_size=2"


def shape() -> ModelShape:
    return shape_of(SMALL)


def run(*arguments: object, code: int = 0, script: str = "-m megagrow") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *script.split(), *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shape(), random_state(shape()))


def test_reshard_diff_and_dry_run(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    forecast = json.loads(run("convert", source, target, TP2, "--dry-run", "--json").stdout)
    assert not target.exists() and forecast["bytes_written"] > 0 and forecast["seconds"] > 0
    recipes = {name: forecast[name] for name in ("copied", "grown", "fresh", "zero")}
    assert recipes == {"copied": forecast["tensors"], "grown": 0, "fresh": 0, "zero": 0}
    assert (
        f"{forecast['tensors']} copied, 0 grown, 0 fresh, 0 zero"
        in run("convert", source, target, TP2, "--dry-run").stdout
    )
    done = json.loads(run("convert", source, target, TP2, "--json").stdout)
    assert done["bytes_written"] == forecast["bytes_written"] and done["bytes_read"] == forecast["bytes_read"]
    assert "36 of 36 tensors equal" in run("diff", source, target).stdout
    assert run("convert", source, target, TP2).stdout.startswith(str(source))  # the second time it finds its own target
    refused = run("convert", source, target, "parallel.pipeline_model_parallel_size=2", code=2)
    assert "another checkpoint" in refused.stderr and "--overwrite" in refused.stderr
    run("convert", source, target, "parallel.pipeline_model_parallel_size=2", "--overwrite")
    found = list(compare_checkpoints(TorchDistReader(source), TorchDistReader(target / "iter_0000010")))
    assert {row.verdict for row in found} == {"equal"}


def test_diff_names_what_differs(source: Path, tmp_path: Path) -> None:
    state = random_state(shape())
    key = next(iter(state))
    state[key] = state[key].clone()
    state[key].view(-1)[3] += 1
    other = write_checkpoint(tmp_path / "other", shape(), state)
    done = run("diff", source, other, code=1)
    assert key in done.stdout and f"1 of {state[key].numel()} values" in done.stdout
    assert f"{len(state) - 1} of {len(state)} tensors equal" in done.stdout


def test_weights_are_exported_to_huggingface_and_legacy_and_imported_again(source: Path, tmp_path: Path) -> None:
    weights = {key: info for key, info in TorchDistReader(source).tensors.items() if not key.startswith("optimizer.")}
    for to in ("huggingface", "legacy"):
        run("convert", source, tmp_path / to, "--to", to)
        again = open_checkpoint(tmp_path / to)
        assert run("inspect", tmp_path / to).stdout.count("weights only") == 1
        for key, info in weights.items():
            box = tuple((0, size) for size in info.shape)
            if "vocab" not in key and "embeddings" not in key and "output_layer" not in key:
                assert torch.equal(again.source.read(key, box), TorchDistReader(source).read_whole(key))
        assert "already exists" in run("convert", source, tmp_path / to, "--to", to, code=2).stderr


def test_without_the_optimizer(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "target", TP2, "--no-optimizer")
    target = TorchDistReader(tmp_path / "target" / "iter_0000010")
    assert not [key for key in target.tensors if key.startswith("optimizer.")]
    run("verify", tmp_path / "target" / "iter_0000010")


def test_an_input_error_is_one_line(source: Path, tmp_path: Path) -> None:
    cases = {
        (source,): "no target directory",
        (tmp_path / "nowhere", "x"): "neither a family.yaml nor a checkpoint directory",
        (tmp_path, tmp_path / "t"): "not a checkpoint of a known format",
        (source, tmp_path / "t", "model.num_layer=8"): "did you mean num_layers?",
        (source, tmp_path / "t", "model.num_layers=1"): "num_layers shrinks",
        (source, tmp_path / "t", "parallel.tensor_model_parallel_size=3"): "does not divide",
        (source, tmp_path / "t", "--memory", "lots"): "use a form like 1GiB",
        (source, tmp_path / "t", "--memory", "100MiB"): "is too little for 1 workers",
        (source, tmp_path / "t", "--to", "gguf"): "unknown format",
        (source, tmp_path / "t", "model.num_layers=8", "--to", "legacy"): "cannot grow",
    }
    for arguments, message in cases.items():
        done = run("convert", *arguments, code=2)
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "t").exists()


def test_sizes_as_people_write_them() -> None:
    sizes = {"1GiB": 2**30, "512MiB": 2**29, "1g": 2**30, "2GB": 2**31, "1.5GiB": 3 * 2**29, "1073741824": 2**30}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "GiB", "-1GiB", "1XB", "nan", "inf"):
        with pytest.raises(ConfigError, match="not a size"):
            parse_bytes(text)


def test_overrides_take_precedence_over_the_source() -> None:
    known = {"source": shape().model_dump(), "precision": "bf16"}
    wanted = target_of(known, ["model.num_layers=8", "growth.layer=stack", "seed=7"])
    assert wanted.model.num_layers == 8 and wanted.source == shape() and wanted.seed == 7
    assert wanted.model.hidden_size == shape().hidden_size and wanted.growth.layer == "stack"
    with pytest.raises(ConfigError, match="hidden_size shrinks"):
        target_of(known, ["model.hidden_size=4"])


def test_megatrons_options(source: Path, tmp_path: Path) -> None:
    given = ["--load-dir", "a", "--save-dir", "b", "--target-tensor-parallel-size", "4"]
    given += ["--loader", "mcore", "--workers", "2"]
    expected = ["convert", "a", "b", "parallel.tensor_model_parallel_size=4", "--to", "torch_dist", "--workers", "2"]
    assert megatron_convert.arguments(given) == expected
    assert megatron_convert.arguments(["--load-dir", "a", "--save-dir", "b", "--saver", "hf"])[-1] == "huggingface"
    assert checkpoint_inspector.arguments(["compare", "a", "b", "--all"]) == ["diff", "a", "b", "--all"]
    given = ["--load-dir", str(source), "--save-dir", str(tmp_path / "b")]
    run(*given, "--target-tensor-parallel-size", "2", script="tools/checkpoint/convert.py")
    assert (tmp_path / "b" / "iter_0000010").is_dir()
