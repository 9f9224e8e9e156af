"""`megagrow plan --from-megatron`: a family.yaml of a run of Megatron-LM, from its script or from a checkpoint."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megagrow.checkpoint.formats.megatron_common import arguments_of
from megagrow.checkpoint.index import DType
from megagrow.config import ParallelLayout, load, load_text
from megagrow.plan import family_plan
from tests.reference.command_line import CommandLine, megagrow
from tools.reference.tiny_checkpoint import SMALL, random_state, shape
from tools.reference.torch_dist_writer import Writer

__all__ = ["megagrow"]
SCRIPT = r"""#!/bin/bash
# pretrain_gpt.py --num-layers 99: a comment, not a command
export CUDA_DEVICE_MAX_CONNECTIONS=1
TP=${TP:-2}
SEQ="${SEQ_LENGTH:-4096}"
MODEL_ARGS=(
    --num-layers 16 --hidden-size 2048   # (the model)
    --ffn-hidden-size 8192
    --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 500000 --seq-length $SEQ --max-position-embeddings 131072
    --attention-dropout 0 --hidden-dropout 0
)
MORE=(--bf16)
MORE+=(--seed 7)
DATA="--data-path 0.7 /data/web_text_document 0.3 /data/code_text_document --split 99,1,0"
if [ -n "$FP8" ]; then
    MORE+=(--fp8-format hybrid)
fi
torchrun --nproc_per_node 8 pretrain_gpt.py \
    "${MODEL_ARGS[@]}" $DATA ${MORE[@]} \
    --tensor-model-parallel-size $TP --sequence-parallel \
    --micro-batch-size 1 --global-batch-size 512 --train-iters 50000 --lr 3e-4 --min-lr=3e-5 \
    --lr-decay-style cosine --lr-warmup-iters 1000 --weight-decay 0.1 --adam-beta2 0.95 \
    --tokenizer-type TOKENIZER \
    --vocab-size 128000 --save $OUT --no-masked-softmax-fusion 2>&1 | tee log
"""


def write(place: Path, tokenizer: str = "NullTokenizer", *changes: tuple[str, str]) -> Path:
    text = SCRIPT.replace("TOKENIZER", tokenizer)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (place / "run.sh").write_text(text)
    return place / "run.sh"


def test_a_script_becomes_a_family(tmp_path: Path, megagrow: CommandLine) -> None:
    said = megagrow.done("plan", "--from-megatron", write(tmp_path))
    (tmp_path / "family.yaml").write_text(said)
    family = load(tmp_path / "family.yaml")
    (stage,) = family.stages
    of = stage.model
    assert (of.num_layers, of.hidden_size, of.ffn_hidden_size, of.groups, of.seq_length) == (16, 2048, 8192, 8, 4096)
    assert (of.rotary_base, of.positions, of.normalization, of.swiglu) == (500000, 131072, "RMSNorm", True)
    assert (of.vocab_size, of.padded_vocab_size, of.add_bias_linear, of.tied) == (128001, 128256, False, False)
    assert (stage.parallel.tensor_model_parallel_size, stage.parallel.sequence_parallel) == (2, True)
    assert (stage.batch.micro_batch_size, stage.batch.global_batch_size, stage.precision) == (1, 512, "bf16")
    schedule = stage.schedule
    assert (schedule.max_lr, schedule.lr_warmup_fraction, schedule.lr_decay_style) == (3e-4, 0.02, "cosine")
    assert schedule.min_lr_ratio == pytest.approx(0.1)
    assert (schedule.weight_decay, schedule.adam_beta2, schedule.adam_beta1) == (0.1, 0.95, 0.9)
    assert family_plan(family).stages[0].iterations == 50_000 and family.seed == 7
    sources = [(each.name, str(each.prefix), each.weight) for each in family.data.sources]
    assert sources == [("web", "/data/web_text_document", 0.7), ("code", "/data/code_text_document", 0.3)]
    assert family.data.split == "99,1,0"
    notes = [line for line in said.splitlines() if line.startswith("# not carried")]
    assert len(notes) == 2 and "--fp8-format: in a condition or a loop" in notes[0] and "data_parallel_size" in notes[1]


@pytest.mark.parametrize(
    ("tokenizer", "expected", "note"),
    [
        ("GPTSentencePieceTokenizer --tokenizer-model /t/own.model", ("SentencePiece", "/t/own.model"), None),
        ("SentencePieceTokenizer --tokenizer-model /t/own.model", ("SentencePiece", "/t/own.model"), "adds tokens"),
        ("HuggingFaceTokenizer --tokenizer-model meta-llama/L", None, "megagrow downloads nothing"),
        ("HuggingFaceTokenizer --tokenizer-model HERE", ("HuggingFace", "HERE"), None),
        ("GPT2BPETokenizer --vocab-file v.json --merge-file m.txt", None, "GPT2TokenizerFast"),
        ("TikTokenizer --tokenizer-model t.json --tiktoken-pattern v2", None, "TikTokenConverter"),
    ],
)
def test_tokenizers_are_taken_or_answered(
    tmp_path: Path, megagrow: CommandLine, tokenizer: str, expected: Any, note: str | None
) -> None:
    said = megagrow.done("plan", "--from-megatron", write(tmp_path, tokenizer.replace("HERE", str(tmp_path))))
    found = yaml.safe_load(said).get("tokenizer")
    if expected is None:
        assert found is None
    else:
        kind, model = expected
        assert found == {"tokenizer_type": kind, "tokenizer_model": model.replace("HERE", str(tmp_path))}
    assert note is None or note in said


def test_what_a_script_does_not_tell_is_asked_for(tmp_path: Path, megagrow: CommandLine) -> None:
    script = write(tmp_path, "NullTokenizer", ("--vocab-size 128000", ""))
    error = megagrow.refused("plan", "--from-megatron", script)
    assert "the size of the vocabulary is not in it; add vocab_size=N" in error
    said = megagrow.done("plan", "--from-megatron", script, "vocab_size=50257", "data_parallel_size=4")
    (stage,) = load_text(said).stages
    assert (stage.model.vocab_size, stage.parallel.data_parallel_size) == (50258, 4)  # the null tokenizer adds one
    assert "write NAME=VALUE" in megagrow.refused("plan", "--from-megatron", script, "vocab_size")
    unknown = write(tmp_path, "NullTokenizer", ("--rotary-base 500000", "--rotary-base $BASE"))
    error = megagrow.refused("plan", "--from-megatron", unknown)  # 10000 would be another model
    assert "--rotary-base $BASE: the script does not tell its value; add rotary_base=VALUE" in error
    (stage,) = load_text(megagrow.done("plan", "--from-megatron", unknown, "rotary_base=20000")).stages
    assert stage.model.rotary_base == 20000
    paths = ("0.7 /data/web_text_document 0.3 /data/code_text_document", "$1")
    outer = write(tmp_path, "NullTokenizer", paths)
    assert "--data-path $1: the script does not tell its value" in megagrow.done("plan", "--from-megatron", outer)


def test_what_cannot_be_followed_is_refused(tmp_path: Path, megagrow: CommandLine) -> None:
    scaled = write(tmp_path, "NullTokenizer", ("--swiglu", "--swiglu --softmax-scale 0.3"))
    assert "softmax_scale" in megagrow.refused("plan", "--from-megatron", scaled)
    for content, message in ((b"echo hello\n", "no flags of pretrain_gpt.py"), (b"A='x\n", "not a shell script")):
        (tmp_path / "other.sh").write_bytes(content)
        assert message in megagrow.refused("plan", "--from-megatron", tmp_path / "other.sh")
    assert "neither a script nor a checkpoint" in megagrow.refused("plan", "--from-megatron", tmp_path / "none")
    code, _, error = megagrow("plan")
    assert code == 2 and "give a FAMILY, or --from-megatron" in " ".join(error.split())


def test_nothing_of_a_script_is_run(tmp_path: Path, megagrow: CommandLine) -> None:
    script = write(tmp_path, "NullTokenizer", ("--bf16", f"--bf16 $(touch {tmp_path}/ran) `touch {tmp_path}/ran`"))
    megagrow("plan", "--from-megatron", script)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_becomes_a_family_that_loads_it(tmp_path: Path, megagrow: CommandLine) -> None:
    of, path = shape(SMALL), tmp_path / "source"
    path.mkdir()
    writer = Writer(path)
    for key, values in random_state(of, optimizer=False).items():
        writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    run = {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 30, "lr": 1e-3, "data_path": ["/d/a"]}
    args = arguments_of(of, ParallelLayout(tensor_model_parallel_size=2), DType.FLOAT32)
    writer.finish({"iteration": 30, "args": Namespace(**{**args, "params_dtype": torch.float32, **run})})
    (stage,) = load_text(megagrow.done("plan", "--from-megatron", path)).stages
    assert stage.load == path and stage.precision == "fp32" and stage.batch.global_batch_size == 4
    assert stage.train_tokens == 30 * 4 * of.seq_length and stage.parallel.tensor_model_parallel_size == 2
    assert stage.model.hidden_size == of.hidden_size
