"""A family.yaml of a run of Megatron-LM: its model, layout, batch, schedule, data and tokenizer, and what is left."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.megatron_common.arguments import layout_of_arguments, shape_of_arguments
from megagrow.errors import CheckpointError

_STYLES = ("cosine", "linear", "constant", "WSD")
_NOT_NEEDED = (
    "save", "load", "tensorboard", "wandb", "log", "vocab_file", "merge_file", "data_cache", "profile", "num_workers",
    "exit_", "distributed_",
)  # fmt: skip
"""Prefixes of arguments that a family.yaml has no use for."""
_REPLACED = ("data_path", "train_data_path", "valid_data_path", "tokenizer_model", "split")
"""Arguments that a user can fill in in the yaml. Without any other, the model or its training would be another one."""
_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_ADVICE = {
    "GPT2BPETokenizer": "write a tokenizer.json with transformers: GPT2TokenizerFast(vocab_file=..., merges_file=...)"
    ".save_pretrained(DIR), and name DIR as tokenizer_model with tokenizer_type HuggingFace",
    "TikTokenizer": "write a tokenizer.json with transformers (convert_slow_tokenizer, TikTokenConverter), and name "
    "its directory as tokenizer_model with tokenizer_type HuggingFace",
}
"""What would do for tokenizers that cannot be taken as they are; tokens that are .bin/.idx pairs need none."""


def family_of_arguments(
    args: Mapping[str, Any], where: Path, *, load: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the tree of a family.yaml with one stage, and notes on what it does not carry.

    Args:
        args: of the run, by Megatron-LM's names.
        where: what they were read from, for errors and names.
        load: the checkpoint that the stage begins with, if there is one.

    Raises:
        CheckpointError: an argument is missing or cannot be followed, with what to add.
    """
    given, notes = dict(args), list[str]()
    unknown = sorted(name for name, value in given.items() if "$" in str(value))
    for name in unknown:
        value = given.pop(name)
        if name in _REPLACED:
            notes.append(f"--{name.replace('_', '-')} {value}: the script does not tell its value")
        elif not name.startswith(_NOT_NEEDED):
            raise CheckpointError(
                f"{where}: --{name.replace('_', '-')} {value}: the script does not tell its value; add {name}=VALUE"
            )
    _set_vocabulary(given, where)
    shape, layout = shape_of_arguments(given, str(where)), layout_of_arguments(given, str(where))
    if not given.get("data_parallel_size"):
        notes.append("data_parallel_size: not told; set stages.0.parallel.data_parallel_size")
    micro = given.get("micro_batch_size") or 1
    batch = {"micro_batch_size": micro, "global_batch_size": given.get("global_batch_size") or micro}
    stage: dict[str, Any] = {"name": where.stem if load is None else "parent"}
    if load is not None:
        stage["load"] = str(load)
    stage |= {
        "model": shape.model_dump(mode="json", exclude_defaults=True),
        "parallel": layout.model_dump(mode="json", exclude_defaults=True),
        "batch": batch,
        "precision": "bf16" if given.get("bf16") or given.get("fp16") else "fp32",
    }
    if given.get("fp16"):
        notes.append("fp16: megagrow trains in bf16 or fp32; the stage says bf16")
    samples = given.get("train_samples") or (given.get("train_iters") or 0) * batch["global_batch_size"]
    if samples:
        stage["train_tokens"] = samples * shape.seq_length
    else:
        notes.append("train_iters and train_samples: not told; the budget decides (stages.0.train_tokens)")
    stage["schedule"] = _schedule(given, samples, batch["global_batch_size"], notes)
    data, tokenizer = _data(given, notes), _tokenizer(given, notes)
    tree: dict[str, Any] = {"name": where.stem, "save": f"runs/{where.stem}", "seed": given.get("seed") or 1234}
    tree |= {"data": data, **({"tokenizer": tokenizer} if tokenizer else {}), "stages": [stage]}
    return tree, notes


def _set_vocabulary(given: dict[str, Any], where: Path) -> None:
    """Add the padded size of the vocabulary, as Megatron-LM computes it, where a script tells the size."""
    if given.get("padded_vocab_size"):
        return
    size = given.get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{where}: the size of the vocabulary is not in it; add vocab_size=N, without padding")
    given.setdefault("make_vocab_size_divisible_by", 128)
    size += given.get("tokenizer_type") == "NullTokenizer"  # its end of a document is not counted
    multiple = given["make_vocab_size_divisible_by"] * (given.get("tensor_model_parallel_size") or 1)
    given["padded_vocab_size"] = math.ceil(size / multiple) * multiple


def _schedule(given: Mapping[str, Any], samples: int, batch: int, notes: list[str]) -> dict[str, Any]:
    """The schedule; Megatron-LM's defaults where a flag is missing."""
    peak, style = given.get("lr"), given.get("lr_decay_style") or "linear"
    found: dict[str, Any] = {
        "weight_decay": given.get("weight_decay", 0.01), "adam_beta1": given.get("adam_beta1", 0.9),
        "adam_beta2": given.get("adam_beta2", 0.999), "adam_eps": given.get("adam_eps", 1e-8),
        "clip_grad": given.get("clip_grad", 1.0), "lr_decay_style": style if style in _STYLES else "cosine",
    }  # fmt: skip
    if peak:
        found |= {"max_lr": peak, "min_lr_ratio": round((given.get("min_lr") or 0.0) / peak, 9)}
    if style not in _STYLES:
        notes.append(f"lr_decay_style {style}: not known here; the stage says cosine")
    steps = samples / batch
    warmup = given.get("lr_warmup_iters") or (given.get("lr_warmup_samples") or 0) / batch
    fraction = given.get("lr_warmup_fraction") or (warmup / steps if steps else 0.0)
    found["lr_warmup_fraction"] = round(min(fraction, 0.99), 6)
    decay = given.get("lr_decay_iters") or (given.get("lr_decay_samples") or 0) / batch
    if decay and steps and decay != steps:
        notes.append(f"lr_decay_iters {decay:g}: a stage's rate decays over all its {steps:g} steps")
    if style == "WSD" and steps and (last := given.get("lr_wsd_decay_iters")):
        found["lr_wsd_decay_fraction"] = round(last / steps, 6)
    return found


def _data(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The sources: prefixes of pairs, with weights where they alternate with them."""
    paths = given.get("data_path")
    listed = paths if isinstance(paths, list) else [paths] if paths else []
    pairs: list[tuple[float, str]] = []
    if len(listed) > 1 and isinstance(listed[0], int | float):
        pairs = [(float(weight), str(path)) for weight, path in zip(listed[::2], listed[1::2], strict=False)]
    else:
        pairs = [(1.0, str(path)) for path in listed]
    for name in ("train_data_path", "valid_data_path", "data_args_path", "per_split_data_args_path", "mock_data"):
        if given.get(name):
            notes.append(f"{name}: not carried; name the pairs in data.sources")
    if not pairs:
        notes.append("data_path: not told; name the .bin/.idx pairs, or text, in data.sources")
        pairs = [(1.0, "PREFIX")]
    names = [Path(path).name.removesuffix("_text_document") or "data" for _, path in pairs]
    sources = [
        {"name": name if names.count(name) == 1 else f"{name}-{at}", "prefix": path, "weight": weight}
        for at, (name, (weight, path)) in enumerate(zip(names, pairs, strict=True))
    ]
    return {"sources": sources, **({"split": str(given["split"])} if given.get("split") else {})}


def _tokenizer(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    kind, model = given.get("tokenizer_type"), given.get("tokenizer_model")
    if kind in (None, "NullTokenizer"):
        return {}
    if kind in _SENTENCEPIECE and model:
        if kind == "SentencePieceTokenizer":
            notes.append("SentencePieceTokenizer adds tokens to the model's own; documents end by its </s> here")
        return {"tokenizer_type": "SentencePiece", "tokenizer_model": str(model)}
    if kind == "HuggingFaceTokenizer" and model:
        if not Path(str(model)).exists():
            notes.append(f"tokenizer_model {model}: not on this machine; megagrow downloads nothing, name a directory")
            return {}
        return {"tokenizer_type": "HuggingFace", "tokenizer_model": str(model)}
    notes.append(f"{kind}: {_ADVICE.get(str(kind), 'not taken; tokens that are .bin/.idx pairs need no tokenizer')}")
    return {}
