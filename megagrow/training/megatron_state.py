"""What a stage's checkpoint holds for Megatron-LM: the arguments, the schedule and the counts that it resumes with."""

from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.directory import Manifest
from megagrow.checkpoint.formats.megatron_common import carried_arguments, resumable, schedule_state
from megagrow.checkpoint.index import DType
from megagrow.config import Family
from megagrow.plan import family_plan

_DTYPES = {"bf16": (DType.BFLOAT16, torch.bfloat16), "fp32": (DType.FLOAT32, torch.float32)}


def megatron_state(family: Family, index: int, manifest: Manifest, tokenizer: Path | None) -> dict[str, Any]:
    """Return the unsharded state of a checkpoint, without the optimizer's.

    Samples are those of the stage: Megatron-LM takes its place in the schedule from them.

    Args:
        family, index: the family, and the index of the stage.
        manifest: of the checkpoint.
        tokenizer: file of the family's tokenizer; None if it was given tokens without one.
    """
    stage, plan = family.stages[index], family_plan(family).stages[index]
    schedule, samples, done = stage.schedule, stage.batch.global_batch_size, manifest.iteration
    min_lr = plan.peak_lr * (1.0 if schedule.lr_decay_style == "constant" else schedule.min_lr_ratio)
    warmup = round(schedule.lr_warmup_fraction * plan.iterations)
    dtype, params_dtype = _DTYPES[stage.precision]
    arguments = carried_arguments(
        {},
        stage.model,
        stage.parallel,
        dtype,
        params_dtype=params_dtype,
        iteration=done,
        consumed_train_samples=done * samples,
        consumed_valid_samples=0,
        train_iters=plan.iterations,
        micro_batch_size=stage.batch.micro_batch_size,
        global_batch_size=samples,
        lr=plan.peak_lr,
        min_lr=min_lr,
        lr_decay_style=schedule.lr_decay_style,
        lr_decay_iters=plan.iterations,
        lr_warmup_iters=warmup,
        weight_decay=schedule.weight_decay,
        adam_beta1=schedule.adam_beta1,
        adam_beta2=schedule.adam_beta2,
        adam_eps=schedule.adam_eps,
        clip_grad=schedule.clip_grad,
        seed=family.seed,
        **_tokenizer(tokenizer, stage.model.vocab_size),
        use_distributed_optimizer=True,
        ckpt_format="torch_dist",
    )
    scheduler = schedule_state(
        max_lr=plan.peak_lr,
        min_lr=min_lr,
        style=schedule.lr_decay_style,
        warmup=warmup,
        iterations=plan.iterations,
        done=done,
        samples=samples,
        decay=schedule.weight_decay,
    )
    return resumable({"iteration": done}, arguments, scheduler, manifest.flops)


def _tokenizer(file: Path | None, vocab_size: int) -> dict[str, Any]:
    """The arguments that name a tokenizer; Megatron-LM takes them with `--use-checkpoint-args` and builds it first.

    Of its two readers of SentencePiece models only the GPT one ends documents by the model's own end-of-sequence token;
    the other adds tokens to the vocabulary. Its null tokenizer counts the vocabulary without the last id, which ends
    documents.
    """
    if file is None:
        return {"tokenizer_type": "NullTokenizer", "vocab_size": vocab_size - 1}
    if file.name.endswith(".json"):
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(file.resolve().parent)}
    return {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": str(file.resolve())}
