"""The command line: bad input is one line and exit code 2, some verbs work without torch, JSON equals the tables.

Verbs that need no torch run as processes, as users run them. Verbs that need it run in this process, which has already
imported it.
"""

import importlib
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megagrow.checkpoint.directory import integrity
from megagrow.cli import main as entry
from megagrow.config import load
from megagrow.plan import family_plan
from tests.unit.family.test_config import TREE
from tools.reference.tiny_checkpoint import random_state, write_checkpoint

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "llama_1b_to_8b" / "family.yaml"
Answer = tuple[int, str, str]


def process(*arguments: object, program: str | None = None) -> Answer:
    """Run `megagrow ARGUMENTS` (or a program with them) as a process."""
    start = ["-m", "megagrow"] if program is None else ["-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "150"}
    command = [sys.executable, *start, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """Run `megagrow ARGUMENTS` in this process."""
    monkeypatch.setattr(logging.getLogger("megagrow"), "handlers", [])

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["megagrow", *map(str, arguments)])
        capfd.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            entry.main()
        return (left.value.code or 0, *capfd.readouterr())  # type: ignore[return-value]  # a whole number here

    yield call
    logging.getLogger("megagrow").propagate = True


def check_rejected(answer: Answer, *names: object, after_progress: bool = False) -> None:
    """Exit code 2 and one line, `megagrow: error:` with the given names; progress may be shown before it."""
    code, _, error = answer
    assert code == 2, error
    if after_progress:
        error = error.splitlines(keepends=True)[-1]
    assert error.startswith("megagrow: error: ") and error.endswith("\n") and error.count("\n") == 1, error
    for name in names:
        assert str(name) in error, error


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A family of two stages with a corpus of 40 documents."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        words = " ".join(f"word{number * place % 97} grows" for place in range(60))
        (tmp_path / "corpus" / f"{number}.txt").write_text(words)
    tree = {**TREE, "save": str(tmp_path / "save"), "budget": {"tokens_per_parameter": 1}}
    tree["data"] = {"sources": [{"paths": [str(tmp_path / "corpus")]}], "workers": 1, "split": "80,20,0"}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "family.yaml"


@pytest.fixture
def trained(file: Path) -> Path:
    """The last checkpoint of a first stage that looks trained."""
    small = load(file).stages[0].model
    save = file.parent / "save" / "small" / "checkpoints"
    return write_checkpoint(save, small, random_state(small), iteration=10, family="tiny", stage="small")


# Invalid families, rejected without torch


BAD = {
    "unknown key": (["stages.0.modle.num_layers=3"], ["stages.0.modle", "unknown key; did you mean model?"]),
    "heads by tp": (
        ["defaults.parallel.tensor_model_parallel_size=3"],
        ["tensor_model_parallel_size 3 does not divide num_attention_heads 4"],
    ),
    "a smaller target": (["stages.1.model.hidden_size=8"], ["hidden_size shrinks from 16 to 8"]),
    "wrong override": (["stages.9.name=x"], ["stages.9.name=x", "2 entries"]),
    "no override": (["seed"], ["override 'seed'", "key.key=value"]),
    "unknown operator": (["stages.1.growth.hidden=ballanced"], ["growth.hidden", "did you mean balanced?"]),
    "impossible growth": (
        ["defaults.model.normalization=LayerNorm", "stages.1.growth.hidden=balanced"],
        ["balanced from 16 to 24", "non-integer ratio"],
    ),
}


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("case", BAD)
def test_an_invalid_family_is_rejected_before_anything_runs(file: Path, verb: str, case: str) -> None:
    overrides, names = BAD[case]
    check_rejected(process(verb, file, *overrides), *names)
    assert not (file.parent / "save").exists()


@pytest.mark.parametrize("kind", ["missing", "no yaml", "a list", "a directory", "binary"])
def test_a_file_that_is_not_a_family_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "family.yaml"
    contents = {"no yaml": b"a: [1", "a list": b"- 1\n- 2\n", "binary": b"\xff\x00"}
    if kind == "a directory":
        file.mkdir()
    elif kind in contents:
        file.write_bytes(contents[kind])
    check_rejected(process("plan", file), file)


@pytest.mark.parametrize("verb", ["train", "convert", "verify"])
def test_an_unknown_stage_is_named(file: Path, verb: str, here: Callable[..., Answer]) -> None:
    check_rejected(
        here(verb, file, "--stage", "huge"), "--stage: no stage 'huge'; the stages are small, large (0 to 1)"
    )


@pytest.mark.parametrize(
    "arguments",
    [("plam",), ("plan",), ("train", "x.yaml"), ("plan", "x.yaml", "--jsn"), ("convert", "x.yaml", "--stage")],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_shows_the_usage(arguments: tuple[str, ...]) -> None:
    code, output, error = process(*arguments)
    assert code == 2 and output == "" and "Error" in error and "Traceback" not in error


# Data


def test_a_missing_tokenizer_is_named(file: Path, here: Callable[..., Answer]) -> None:
    wanted = file.parent / "none.model"
    check_rejected(here("data", file, f"tokenizer.tokenizer_model={wanted}"), wanted)
    (file.parent / "junk.model").write_bytes(b"junk")
    check_rejected(here("data", file, f"tokenizer.tokenizer_model={file.parent / 'junk.model'}"), "junk.model")


def test_an_empty_or_missing_corpus_is_named(file: Path, here: Callable[..., Answer]) -> None:
    (file.parent / "empty.txt").touch()
    for name in ("empty.txt", "none.txt"):
        check_rejected(here("data", file, f"data.sources.0.paths=[{file.parent / name}]"), file.parent / name)
        assert not (file.parent / "save" / "data" / "prepared.json").exists()


# Checkpoints


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "common.pt"])
def test_a_torch_dist_directory_without_metadata_is_named(
    file: Path, trained: Path, here: Callable[..., Answer], name: str
) -> None:
    (trained / name).unlink()
    wanted = f"{trained}: incomplete torch_dist checkpoint: {name} is missing"
    check_rejected(here("inspect", trained), wanted)
    check_rejected(here("verify", trained), wanted)
    check_rejected(here("verify", file, "--stage", "small"), wanted)
    check_rejected(here("convert", file, "--stage", "large"), wanted)
    assert not (file.parent / "save" / "large").exists()


def test_a_path_without_a_checkpoint_is_named(file: Path, here: Callable[..., Answer]) -> None:
    for verb in ("inspect", "verify"):
        check_rejected(here(verb, file.parent / "nowhere"), file.parent / "nowhere", "no such checkpoint directory")
        check_rejected(here(verb, file.parent / "corpus"), "not a checkpoint of a known format")
    check_rejected(here("convert", file, "--stage", "large", "--source", file.parent / "nowhere"), "nowhere")


class Touch:
    """An object whose pickle runs a program when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("sealed", [False, True], ids=["found by its checksum", "sealed by a stranger"])
def test_a_foreign_pickle_is_named_and_not_executed(
    file: Path, trained: Path, here: Callable[..., Answer], name: str, sealed: bool
) -> None:
    ran = file.parent / "ran"
    if name == "common.pt":
        torch.save({"args": Touch(ran)}, trained / name)
    else:
        (trained / name).write_bytes(pickle.dumps(Touch(ran)))
    if sealed:
        integrity.seal(trained)
    wanted = "would import posix.system" if sealed else "damaged|bytes"
    for arguments in (("verify", trained), ("convert", file, "--stage", "large")):
        answer = here(*arguments)
        check_rejected(answer, trained / name)
        assert re.search(wanted, answer[2])
    assert not ran.exists()
    assert not list((file.parent / "save" / "large" / "checkpoints").glob("*"))


def test_an_impossible_conversion_is_rejected_with_its_reason(file: Path, here: Callable[..., Answer]) -> None:
    check_rejected(here("convert", file, "--stage", "small"), "stage 'small' is the first", "--source")
    check_rejected(here("convert", file, "--stage", "large"), "stage 'small' has no checkpoint yet; train it first")
    check_rejected(here("verify", file, "--stage", "1"), "stage 'large' has no checkpoint yet")


def test_an_ungrown_stage_is_not_trained(file: Path) -> None:
    answer = process("train", file, "--stage", "large")
    check_rejected(answer, "'large' grows from 'small'", "megagrow convert", after_progress=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_named_and_nothing_is_left_on_it(
    file: Path, trained: Path, here: Callable[..., Answer], small_disk: Path
) -> None:
    check_rejected(here("convert", file, "--stage", "large", "--save", small_disk), small_disk, "disk is full")
    assert list(small_disk.iterdir()) == []
    answer = here("data", file, f"save={small_disk}", "defaults.model.vocab_size=400")
    check_rejected(answer, small_disk, after_progress=True)
    assert "full" in answer[2] or "No space left" in answer[2]
    assert not (small_disk / "data" / "prepared.json").exists()


# Verbs that work, and their JSON


def test_a_checkpoint_is_converted_verified_and_inspected(
    file: Path, trained: Path, here: Callable[..., Answer]
) -> None:
    code, output, error = here("convert", file, "--stage", "large", "--json")
    assert code == 0 and error == ""
    record = json.loads(output)
    assert record["operators"] == {"hidden": "zero_pad"} and record["source"] == str(trained)
    grown = Path(record["target"])
    code, output, error = here("verify", file, "--stage", "large", "--json")
    findings = json.loads(output)
    assert code == 0 and findings["faults"] == [] and findings["checkpoint"] == str(grown)
    assert any("descends" in check for check in findings["checks"])
    code, output, error = here("verify", grown)
    assert code == 0 and f"{findings['tensors']} tensors, {findings['values']:,} values, 0 faults" in output
    code, output, error = here("inspect", grown, "--tensors", "--json")
    content = json.loads(output)
    assert code == 0 and content["stage"] == "large" and len(content["tensors"]) == findings["tensors"]
    assert content["what_is_new"]["axes"]["hidden"]["to"] == 24
    code, output, error = here("inspect", grown, "--tensors")
    assert code == 0
    for row in content["tensors"]:  # the tree has the last part of each name with shape, type and bytes
        assert f"{row['bytes']:,} bytes" in output and f"{row['key'].rpartition('.')[2]}  [" in output


def test_a_damaged_checkpoint_has_faults_in_json_too(trained: Path, here: Callable[..., Answer]) -> None:
    (trained / "common.pt").write_bytes(b"junk")
    code, output, error = here("verify", trained, "--json")
    (fault,) = json.loads(output)["faults"]
    assert code == 2 and f"{trained / 'common.pt'}: 4 bytes" in fault


def test_the_plan_as_json_is_the_plan_and_the_table_shows_it() -> None:
    code, output, error = process("plan", EXAMPLE, "--json")
    content = json.loads(output)
    plan = family_plan(load(EXAMPLE))
    assert code == 0 and error == ""
    assert [row["tokens"] for row in content["rows"]] == [stage.tokens for stage in plan.stages]
    assert [row["flops_exact"] for row in content["rows"]] == [stage.flops.exact for stage in plan.stages]
    code, table, error = process("plan", EXAMPLE)
    assert code == 0 and error == ""
    for row in content["rows"]:
        (line,) = (line for line in table.splitlines() if line.startswith(row["name"] + " "))
        assert f" {row['tokens'] / 1e9:g} B " in line and f" {row['iterations']:,} " in line
        assert all(f" {row[key]:.2e} ".replace("e+", "e") in line for key in ("flops_6nt", "flops_exact"))
    assert "24.7 %" in table and any("24.7 %" in note for note in content["footnotes"])


WITHOUT_TORCH = """
import sys

class BlockTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformer_engine", "apex"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, BlockTorch())
from megagrow.cli.main import main
main()
"""


def test_planning_and_reporting_need_no_torch(file: Path, trained: Path) -> None:
    code, output, error = process("--help", program=WITHOUT_TORCH)
    assert code == 0 and error == "" and all(verb in output for verb in ("plan", "run", "report", "verify"))
    code, output, error = process("plan", file, "--json", program=WITHOUT_TORCH)
    assert code == 0 and error == "" and [row["name"] for row in json.loads(output)["rows"]] == ["small", "large"]
    code, output, error = process("report", file, "--json", program=WITHOUT_TORCH)
    assert code == 0 and error == "" and json.loads(output)["rows"][0]["name"] == "small"
    code, output, error = process("report", file, program=WITHOUT_TORCH)
    page = file.parent / "save" / "report.html"
    assert code == 0 and str(page) in output.replace("\n", "") and "<html" in page.read_text()


def test_run_rejects_an_impossible_family_without_torch(file: Path) -> None:
    overrides = ["stages.1.growth.layer=stak", "stages.1.model.num_layers=6"]
    check_rejected(process("run", file, *overrides, program=WITHOUT_TORCH), "growth.layer", "did you mean stack?")


def test_importing_torch_is_blocked_in_these_tests() -> None:
    code, _, error = process("verify", "nowhere", program=WITHOUT_TORCH)
    assert code == 1 and "torch is blocked" in error


def test_planning_takes_less_than_a_second_of_processor_time() -> None:
    program = "import os, sys\n" + "from megagrow.cli.main import main\ntry: main()\n"
    program += "except SystemExit: pass\nprint(sum(os.times()[:2]), file=sys.stderr)"
    seconds = [float(process("plan", EXAMPLE, program=program)[2]) for _ in range(3)]
    assert min(seconds) < 1.0, seconds


def examples_of(verb: str, here: Callable[..., Answer]) -> list[str]:
    """The command lines after `Example:` in a verb's help; the help wraps them, and ends each with an empty line."""
    code, output, _ = here(verb, "--help")
    assert code == 0
    paragraphs = [" ".join(text.split()) for text in output.split("\n\n")]
    return [text.removeprefix("Example: ") for text in paragraphs if text.startswith("Example: ")]


COMMANDS = [command for command in entry.app.registered_commands if not command.hidden]
VERBS = sorted(command.callback.__name__ for command in COMMANDS if command.callback)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, here: Callable[..., Answer]) -> None:
    examples = examples_of(verb, here)
    assert examples and all(f"megagrow {verb}" in line for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_paths_in_the_examples_exist_after_make_demo(verb: str, here: Callable[..., Answer]) -> None:
    demo = load(ROOT / "examples" / "demo" / "family.yaml")
    kept = {
        f"{demo.save}/{stage.name}/checkpoints/iter_{iteration:07d}"
        for stage, planned in zip(demo.stages, family_plan(demo).stages, strict=True)
        for iteration in saved_iterations(planned.iterations, demo.checkpoint.save_interval)[-demo.checkpoint.keep :]
    }
    made = {f"{demo.save}/{stage.name}/checkpoints" for stage in demo.stages} | kept
    for line in examples_of(verb, here):
        for path in re.findall(r"examples/\S+", line):
            assert (ROOT / path).is_file(), line
        assert set(re.findall(rf"{demo.save}/\S+", line)) <= made, line


def saved_iterations(last: int, interval: int) -> list[int]:
    """Iterations at which a training of `last` steps saves a checkpoint."""
    return [*range(interval, last, interval), last]


def test_only_rank_0_prints_an_error(file: Path, here: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert here("plan", file, "seed=x")[0::2] == (2, "")
    monkeypatch.setenv("RANK", "0")
    check_rejected(here("plan", file, "seed=x"), "seed")


def test_the_package_runs_as_a_module() -> None:
    assert importlib.import_module("megagrow.__main__")
