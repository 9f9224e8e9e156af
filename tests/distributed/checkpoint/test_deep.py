"""`megagrow verify --deep` as people call it: on real conversions on disk, in any layout, honest and tampered with."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import sentencepiece

from megagrow import records
from megagrow.checkpoint.directory import integrity, iterations
from megagrow.checkpoint.directory.manifest import read_manifest, write_manifest
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.plan.parameters import count_parameters
from megagrow.records import DeepRecord
from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP, WIDER, Said, verb
from tests.distributed.ranks.launcher import run_ranks
from tests.unit.training.command import write_pair
from tools.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint
from tools.reference.torch_dist_writer import Writer

BALANCED = {"hidden": "balanced", "ffn": "balanced", "head": "balanced", "moments": "exact"}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
GROWN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, LARGE, TP2),
    "copies": (BALANCED, {**LARGE, "num_layers": 4}, PP2),
    "stack": ({"layer": "stack"}, {**LARGE, "num_layers": 4}, {}),
    "resharded": ({}, SMALL, TP2),
}


def work(root: Path) -> dict[str, Said]:
    """What the verb said of each case; records lie beside the checkpoints."""
    of = shape(SMALL)
    # weights as of a trained model: small, and gains near one
    state = {key: 0.1 * value.abs() if "_sq" in key else 0.3 * value for key, value in random_state(of).items()}
    for key in [key for key in state if key.endswith(("norm_weight", "layernorm.weight")) and "exp_avg" not in key]:
        state[key] = state[key] + 1.0
    parent = write_checkpoint(root / "small", of, state)
    for name, (growth, sizes, layout) in GROWN.items():
        target = TargetSpec("large", shape(sizes), ParallelLayout(**layout), GrowthConfig(**growth), "fp32", 1)
        convert_checkpoint(parent, root / name, target)
    tamper(root / "exact" / "iter_0000000", root / "tampered" / "iter_0000000", masters=True)
    tamper(root / "exact" / "iter_0000000", root / "unrounded" / "iter_0000000", masters=False)
    half = {key: value.bfloat16() for key, value in state.items() if not key.startswith("optimizer")}
    both = write_checkpoint(root / "half", of, half)
    convert_checkpoint(
        both, root / "bf16", TargetSpec("large", shape(LARGE), ParallelLayout(), GrowthConfig(), "bf16", 1)
    )
    said = {name: verb("verify", "--deep", child(root, name)) for name in (*GROWN, "tampered", "unrounded", "bf16")}
    said["resharded"] = verb("verify", "--deep", child(root, "resharded"), "--parent", parent)
    said["other"] = verb("verify", "--deep", child(root, "exact"), "--parent", child(root, "stack"))
    said["alone"] = verb("verify", "--deep", parent)
    said |= foreign(root, parent)
    return said | family(root)


def done(said: Said) -> None:
    assert said.code == 0, said.text


def foreign(root: Path, parent: Path) -> dict[str, Said]:
    """Parents and children in Hugging Face's format, grown in one command and in two, and one tampered with."""
    sizes = [f"model.{name}={size}" for name, size in LARGE.items()]
    made = {name: root / f"foreign-{name}" / name for name in ("parent", "one", "exported", "bad")}
    done(verb("convert", parent, made["parent"], "--to", "huggingface"))
    done(verb("convert", made["parent"], made["one"], "--to", "huggingface", *sizes))
    done(verb("convert", made["parent"], root / "foreign-two", *sizes))
    done(verb("convert", child(root, "exact"), made["exported"], "--to", "huggingface"))
    shutil.copytree(made["one"], made["bad"])
    file = made["bad"] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-400:-300] = content[-300:-200]  # weights, not the header
    file.write_bytes(content)
    (root / "text.txt").write_text("abc " * 200)
    write_pair(root / "pair", [list(range(30))] * 20, np.uint16)
    write_pair(root / "high", [[1, 30]] * 200, np.uint16)
    deep = ("verify", "--deep")
    said = {f"foreign {name}": verb(*deep, made[name], "--parent", made["parent"]) for name in ("one", "bad")}
    said["foreign two"] = verb(*deep, child(root, "foreign-two"))
    said["foreign exported"] = verb(*deep, made["exported"], "--parent", parent)
    said["foreign same"] = verb(*deep, made["parent"], "--parent", parent, "--data", root / "pair")
    said["foreign other"] = verb(*deep, made["parent"], "--parent", made["one"])
    said["high"] = verb(*deep, made["one"], "--parent", made["parent"], "--data", root / "high")
    said["no tokenizer"] = verb(*deep, made["one"], "--parent", made["parent"], "--text", root / "text.txt")
    logits = 4 * 8 * (4 * 149) * 30  # of 600 ids, in float64, with gradients and copies
    shutil.copytree(root / "exact", root / "forward")
    small = logits + count_parameters(shape(LARGE)).total * 8 * 4
    for name, free in (("forward", small), ("short", 1000)):
        with mock.patch("psutil.virtual_memory", lambda free=free: Namespace(available=free)):
            said[name] = verb(*deep, child(root, "forward"), "--data", root / "pair")
    options: dict[str, Any] = {"vocab_size": 30, "model_type": "unigram", "unk_id": 0, "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd bcd dab"] * 30),
        model_prefix=str(root / "own"),
        hard_vocab_limit=False,
        **options,
    )
    model = root / "own.model"
    said["text"] = verb(*deep, child(root, "foreign-two"), "--text", root / "text.txt", "--tokenizer", model)
    return said


def child(root: Path, name: str) -> Path:
    """Checkpoint of a case."""
    return next((root / name).glob("iter_*"))


def tamper(source: Path, target: Path, *, masters: bool) -> None:
    """Write a checkpoint again, sealed and whole, with one tensor of every new weight changed."""
    reader, staging = TorchDistReader(source), iterations.new_staging(target)
    writer = Writer(staging)
    for key, info in reader.tensors.items():
        values = reader.read_whole(key)
        of_weights = not key.startswith("optimizer.") or (masters and ".param." in key)
        if key.endswith("mlp.linear_fc2.weight") and of_weights:
            values = values * 1.01
        writer.put(key, info.shape, (0,) * len(info.shape), values)
    for key in reader.objects:
        writer.put_object(key, reader.read_object(key))
    writer.finish(reader.common())
    write_manifest(staging, read_manifest(source))
    (staging / "growth.json").write_text((source / "growth.json").read_text())
    integrity.seal(staging)
    iterations.publish(staging, target)


def family(root: Path) -> dict[str, Said]:
    """A family of two stages: trained, grown, verified by its name before and after its second stage trains."""
    text = families.write_text(root / "text.jsonl")
    short: dict[str, Any] = {"train_tokens": 2 * TOKENS_PER_STEP}
    stages = [families.stage("small", LLAMA, **short), families.stage("large", LLAMA | WIDER, **short)]
    file = families.write_family(root / "family", text, stages)
    verb("data", file)
    verb("train", file, "--stage", "small")
    verb("convert", file, "--stage", "large")
    said = {"family": verb("verify", "--deep", file, "--stage", "large")}
    verb("train", file, "--stage", "large")
    return said | {"trained": verb("verify", "--deep", file, "--stage", "large")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deep")


@pytest.fixture(scope="module")
def said(root: Path) -> dict[str, Said]:
    return run_ranks("tests.distributed.checkpoint.test_deep:work", 1, root)[0]


def record(file: Path) -> DeepRecord:
    """The last deep record of a file."""
    found = [record for record in records.read(file) if isinstance(record, DeepRecord)]
    assert found, file
    return found[-1]


@pytest.mark.parametrize("name", ["exact", "copies", "resharded"])
def test_an_honest_promise_passes(name: str, root: Path, said: dict[str, Said]) -> None:
    assert said[name].code == 0, said[name].text
    found = record(root / name / "deep.jsonl")
    assert found.verdict == "exact" and found.promised
    if name == "resharded":
        assert found.words == "exact" and found.logit_difference == 0.0 and found.live_after_one is None
    else:
        assert found.words.startswith("exact: within") and 0 < found.logit_difference_relative < 1e-5
    assert found.precision == "fp64" and found.weights == "fp32"
    assert abs(found.child_loss - found.parent_loss) < 1e-5


def test_the_residual_stream_is_shown_layer_beside_layer(root: Path, said: dict[str, Said]) -> None:
    rows = record(root / "exact" / "deep.jsonl").residual
    assert [(row.layer, row.parent_layer) for row in rows] == [(0, 0), (1, 1), (2, None), (3, 2)]
    for row in rows:
        assert row.parent is None or row.child == pytest.approx(row.parent, rel=1e-5)
    assert rows[2].child == pytest.approx(rows[1].child, rel=1e-6)


def test_new_entries_come_alive_and_gradients_are_as_predicted(root: Path, said: dict[str, Said]) -> None:
    for name in ("exact", "copies"):
        found = record(root / name / "deep.jsonl")
        assert found.live_after_one is not None
        assert found.new_entries > 500 and 0 < found.live_after_one < 1 and found.live_after_two == 1.0
        assert len(found.gradients) >= 9 and max(row.error for row in found.gradients) < 1e-5
        assert "new layers have no source gradient" in found.gradient_limits


def test_copies_with_equal_moments_stay_alike(root: Path, said: dict[str, Said]) -> None:
    found = record(root / "copies" / "deep.jsonl")
    assert {row.axis for row in found.copies} == {"hidden", "ffn", "head", "head and group"}
    assert found.steps == 20 and all(row.copies > 0 and row.weights > 0.9999 for row in found.copies)
    assert not record(root / "exact" / "deep.jsonl").copies


def test_what_does_not_preserve_says_so_and_passes(root: Path, said: dict[str, Said]) -> None:
    assert said["stack"].code == 0, said["stack"].text
    found = record(root / "stack" / "deep.jsonl")
    assert found.verdict == "not preserving" and not found.promised
    assert found.words.startswith("not preserving, as this operator is: within ")
    assert found.logit_difference_relative > 1e-2 and not found.gradients


def test_a_broken_promise_fails(root: Path, said: dict[str, Said]) -> None:
    assert said["tampered"].code == 2
    assert "its lineage promises the parent's function" in said["tampered"].text
    found = record(root / "tampered" / "deep.jsonl")
    assert found.verdict == "broken" and found.promised and found.logit_difference_relative > 1e-5


def test_weights_that_are_not_their_masters_fail(said: dict[str, Said]) -> None:
    assert said["unrounded"].code == 2
    assert "rounded: one of them is wrong" in said["unrounded"].text


def test_bf16_weights_without_masters_are_held_to_their_own_rounding(root: Path, said: dict[str, Said]) -> None:
    assert said["bf16"].code == 0, said["bf16"].text
    found = record(root / "bf16" / "deep.jsonl")
    assert found.verdict == "within" and found.weights == "bf16" and 1e-5 < found.logit_difference_relative < 5e-2


def test_wrong_parents_are_refused(said: dict[str, Said]) -> None:
    assert said["other"].code == 2 and "was grown from" in said["other"].text
    assert said["alone"].code == 2 and "was not grown" in said["alone"].text and "--parent" in said["alone"].text


def test_a_family_runs_on_its_own_validation_data(root: Path, said: dict[str, Said]) -> None:
    assert said["family"].code == 0, said["family"].text
    found = record(root / "family" / "records.jsonl")
    assert found.verdict == "exact" and "random tokens are used" not in said["family"].text
    assert found.parent.endswith("small/checkpoints/iter_0000002") and found.tokens == 4 * families.SEQUENCE
    assert found.parent_loss < 5.77  # ln 320: the samples are not random tokens


def test_a_stage_that_has_trained_on_is_not_compared(said: dict[str, Said]) -> None:
    assert said["trained"].code == 2 and "has trained 2 steps since it was grown" in said["trained"].text


@pytest.mark.parametrize("name", ["one", "two", "exported"])
def test_foreign_parents_and_children_are_compared(name: str, root: Path, said: dict[str, Said]) -> None:
    """A parent and a child of Hugging Face; a Hugging Face parent of ours; our parent of an export."""
    assert said[f"foreign {name}"].code == 0, said[f"foreign {name}"].text
    place = {"two": "foreign-two"}.get(name, f"foreign-{name}")
    found = record(root / place / "deep.jsonl")
    assert found.verdict == "exact" and found.promised and found.operators["layer"] == "identity"
    assert name == "two" or found.tokens_from == "random tokens"
    assert name == "two" or found.live_after_two == 1.0  # a text has fewer tokens than rows
    assert len(found.gradients) >= 9 and max(row.error for row in found.gradients) < 1e-5


def test_the_same_model_in_another_format_is_the_same(root: Path, said: dict[str, Said]) -> None:
    assert said["foreign same"].code == 0, said["foreign same"].text
    found = record(root / "foreign-parent" / "deep.jsonl")
    assert found.words == "exact" and not found.operators and found.tokens_from == f"the tokens of {root / 'pair'}"


def test_a_changed_export_is_noticed(root: Path, said: dict[str, Said]) -> None:
    assert said["foreign bad"].code == 2 and "its lineage promises the parent's function" in said["foreign bad"].text


def test_what_does_not_belong_together_or_cannot_be_read_is_refused(root: Path, said: dict[str, Said]) -> None:
    assert said["foreign other"].code == 2 and "neither the model of" in said["foreign other"].text
    assert said["high"].code == 2 and "ids outside the model's vocabulary of 30" in said["high"].text
    assert said["no tokenizer"].code == 2 and "give one with --tokenizer" in said["no tokenizer"].text


def test_memory_decides_what_is_run(root: Path, said: dict[str, Said]) -> None:
    assert said["forward"].code == 0, said["forward"].text
    found = record(root / "forward" / "deep.jsonl")
    assert found.verdict == "exact" and found.steps == 0 and not found.gradients
    assert found.gradient_limits == (
        "only forward passes were run: memory does not suffice for gradients and training steps",
    )
    assert said["short"].code == 0 and "--deep was not run: needs about 0.0 GiB" in said["short"].text


def test_a_text_is_encoded_by_the_tokenizer_beside_the_model(root: Path, said: dict[str, Said]) -> None:
    assert said["text"].code == 0, said["text"].text
    found = record(root / "foreign-two" / "deep.jsonl")
    assert found.tokens_from == f"the text {root / 'text.txt'}" and found.verdict == "exact"
