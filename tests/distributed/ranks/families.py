"""Tiny families for tests that train: a made-up text, a family.yaml of some hundred thousand parameters, its numbers.

The text is drawn word by word from a fixed seed: the same on every machine, and with enough order in it to be
learned. A test prepares it once and every case takes the result over by a link (`lend`), which is allowed because
what the data was made from does not include where the family is saved. `verb` is a command line without a process.
"""

import contextlib
import io
import json
import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import yaml

from megagrow import records
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.records import EvalRecord, StepRecord

LLAMA = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2}
GPT = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute", "swiglu": False, "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
}  # fmt: skip
WIDER = {"num_layers": 6, "hidden_size": 40, "ffn_hidden_size": 112, "num_attention_heads": 6}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "DP2": {"data_parallel_size": 2},
}
STEPS, SEQUENCE, BATCH = 20, 32, 8
TOKENS_PER_STEP = SEQUENCE * BATCH


def write_text(path: Path, documents: int = 300) -> Path:
    """Write a JSONL file of documents in which a word often follows the same other word."""
    chance = random.Random(7)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 7))) for _ in range(120)]
    follows = {word: chance.choices(words, k=3) for word in words}
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(documents):
            text = [chance.choice(words)]
            while len(text) < 80:
                text.append(chance.choice(follows[text[-1]] if chance.random() < 0.8 else words))
            stream.write(json.dumps({"text": " ".join(text)}) + "\n")
    return path


def stage(name: str, model: dict[str, Any], layout: str = "TP1", **more: Any) -> dict[str, Any]:
    """A stage of a family, as its yaml has it."""
    sizes = {"vocab_size": 320, "make_vocab_size_divisible_by": 64, "seq_length": SEQUENCE, "kv_channels": 8}
    return {
        "name": name,
        "model": sizes | model,
        "parallel": LAYOUTS[layout],
        "batch": {"micro_batch_size": 2, "global_batch_size": BATCH},
        "schedule": {"max_lr": 3e-3, "lr_warmup_fraction": 0.1},
        "precision": "fp32",
        "train_tokens": STEPS * TOKENS_PER_STEP,
        **more,
    }


def write_family(save: Path, text: Path, stages: list[dict[str, Any]], **more: Any) -> Path:
    """Write `<save>.yaml`, a family of these stages that keeps everything in `save`; return its path."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "save": str(save),
        "data": {"sources": [{"name": "made", "paths": [str(text)]}], "split": "90,9,1", "workers": 1},
        "evaluation": {"eval_interval": 10, "eval_samples": 24},
        "checkpoint": {"save_interval": 10, "keep": 7},
        "stages": stages,
        **more,
    }
    file = save.with_name(save.name + ".yaml")
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


class Said(NamedTuple):
    """What a verb left: its exit code and all that it wrote for people, log lines included."""

    code: int
    text: str


def verb(*arguments: Any) -> Said:
    """Do in this process what `python -m megagrow ARGUMENTS` does in its own; as a rank, stay in the job."""
    from megagrow.cli.main import main
    from megagrow.runtime import process

    text = io.StringIO()
    listener = logging.StreamHandler(text)
    logger = logging.getLogger("megagrow")
    logger.addHandler(listener)
    try:
        with (
            mock.patch.object(sys, "argv", ["megagrow", *map(str, arguments)]),
            mock.patch.object(process, "stop", process.reset),
            contextlib.redirect_stderr(text),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        logger.removeHandler(listener)
    return Said(code, text.getvalue())


def lend(data: Path, save: Path) -> None:
    """Let a family use the data that another prepared."""
    save.mkdir(parents=True, exist_ok=True)
    (save / "data").symlink_to(data.resolve(), target_is_directory=True)


def rewind(save: Path, copy: Path, name: str, iteration: int) -> Path:
    """Copy a trained family, its stage `name` as if it had been killed just after saving `iteration`."""
    shutil.copytree(save, copy, symlinks=True)
    checkpoints = copy / name / "checkpoints"
    for found in checkpoints.glob("iter_*"):
        if int(found.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(found)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return copy


def curve(family: Family | Path, index: int = 0) -> list[float]:
    """Training losses of a stage, one a step, by its records; AssertionError unless they are steps 1, 2, 3, ..."""
    taken = steps(family, index)
    assert [record.iteration for record in taken] == list(range(1, len(taken) + 1))
    return [record.loss for record in taken]


def steps(family: Family | Path, index: int = 0) -> list[StepRecord]:
    """Records of a stage's steps, in the order of the file."""
    return [record for record in _of(family, index) if isinstance(record, StepRecord)]


def validation(family: Family | Path, index: int = 0) -> dict[int, float]:
    """Validation losses of a stage by iteration; AssertionError if one was taken twice."""
    taken = [record for record in _of(family, index) if isinstance(record, EvalRecord)]
    losses = {record.iteration: record.loss for record in taken}
    assert len(losses) == len(taken)
    return losses


def _of(family: Family | Path, index: int) -> list[records.AnyRecord]:
    return list(records.read(FamilyPaths(_family(family)).stage(index).records))


def _family(family: Family | Path) -> Family:
    return load(family) if isinstance(family, Path) else family
