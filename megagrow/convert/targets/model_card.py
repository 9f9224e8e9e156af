"""What an exported model that was grown has beside its weights: a model card, the growth record and its new parameters.

The card says where the model comes from, what is new in it, what of that is proved and how to go on. It carries the
parent's license: the fields of its card by name, and the files themselves (`LICENSE_FILES`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megagrow
from megagrow.checkpoint.tensors import GROWTH_RECORD, NEW_PARAMETERS, write_growth_record
from megagrow.convert.targets.protocol import PlannedTarget
from megagrow.growth.maps import GrowthStep

CARD = "README.md"
_MOST_CARD_BYTES = 1 << 20
_CARRIED = re.compile(r"^(license(?:_name|_link)?|language):[ \t]*([^\r\n]{1,200})$", re.MULTILINE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+)--([\w.-]+)")


def describe_growth(
    staging: Path,
    target: PlannedTarget,
    step: GrowthStep,
    source: Path,
    storage: str,
    *,
    parent: str | None = None,
    steps_since: int = 0,
) -> None:
    """Write the growth record, `new_parameters.json` and the model card into an export's (staging) directory.

    Args:
        staging: the directory.
        target: the planned export.
        step: the growth step.
        source: what was exported: the parent, or a checkpoint that was grown from it.
        storage: what storing the values rounded.
        parent: what the growth began with, in words; None if it is the source.
        steps_since: training steps since the growth.
    """
    from megagrow.convert.targets.huggingface import HuggingFaceTarget  # every conversion would wait for it

    assert isinstance(target, HuggingFaceTarget)
    write_growth_record(staging, step)
    new = target.new_parameters(step)
    (staging / NEW_PARAMETERS).write_text(_by_tensor(new))
    (staging / CARD).write_text(_card(step, new, target.config, source, storage, parent, steps_since))


def _by_tensor(new: Mapping[str, Any]) -> str:
    """The content as JSON with one tensor a line, short enough to read."""
    tensors = new["tensors"]
    partly = ",\n".join(f"   {json.dumps(name)}: {json.dumps(each)}" for name, each in tensors["partly_new"].items())
    whole = ",\n".join(f"   {json.dumps(name)}" for name in tensors["new"])
    return (
        f'{{\n "format": {new["format"]},\n "layers": {json.dumps(new["layers"])},\n'
        f' "tensors": {{\n  "count": {tensors["count"]},\n  "new": [\n{whole}\n  ],\n'
        f'  "partly_new": {{\n{partly}\n  }}\n }}\n}}\n'
    )


def _card(
    step: GrowthStep,
    new: Mapping[str, Any],
    config: Mapping[str, Any],
    source: Path,
    storage: str,
    parent: str | None,
    steps_since: int,
) -> str:
    parent = parent or _parent_name(source, config)
    matter = _carried_fields(source)
    if _HUB_NAME.fullmatch(parent):
        matter["base_model"] = parent
    head = [
        "---", *(f"{name}: {value}" for name, value in matter.items()), "library_name: transformers",
        "tags:", "- megagrow", "- model-growth", "---",
    ]  # fmt: skip
    return "\n".join([*head, "", *_body(step, new, parent, storage, steps_since)]) + "\n"


def _body(step: GrowthStep, new: Mapping[str, Any], parent: str, storage: str, steps_since: int) -> list[str]:
    small, large = step.small, step.large
    sizes = [
        ("layers", small.num_layers, large.num_layers), ("hidden size", small.hidden_size, large.hidden_size),
        ("MLP size", small.ffn_hidden_size, large.ffn_hidden_size),
        ("attention heads", small.num_attention_heads, large.num_attention_heads),
        ("key/value heads", small.groups, large.groups),
    ]  # fmt: skip
    if large.num_moe_experts:
        sizes.append(("experts", small.num_moe_experts or 0, large.num_moe_experts))
    layers, tensors = new["layers"]["new"], new["tensors"]
    operators = ", ".join(f"{axis} `{name}`" for axis, name in step.operators.items())
    trained = (
        f"It was trained for {steps_since:,} steps since."
        if steps_since
        else "It has not been trained since: train it before you use it, and its new parts will come to matter."
    )
    function = (
        "In exact arithmetic the grown model computed the same function as its parent when it was made"
        if step.exact
        else "These operators do not preserve the parent's function"
    )
    return [
        f"# Grown from {parent}", "",
        f"This model was grown from {parent} by megagrow {megagrow.__version__}. {trained}", "",
        "| | parent | this model |", "|---|---|---|",
        *(f"| {name} | {old} | {now} |" for name, old, now in sizes), "",
        "## What is new", "",
        f"Operators: {operators}. Seed of the random parts: {step.seed}.", "",
        f"- New layers, counted from 0: {', '.join(map(str, layers)) or 'none'}.",
        f"- {len(tensors['new'])} of {tensors['count']} tensors are new, and {len(tensors['partly_new'])} have new "
        "rows or columns.",
        f"- `{NEW_PARAMETERS}` names them as transformers does, and `{GROWTH_RECORD}` holds the maps.", "",
        "## Proof", "",
        f"{function}. Storage: {storage}. Measure it, on tokens of your own:", "",
        "```", "megagrow verify --deep . --parent DIRECTORY_OF_THE_PARENT --text TEXT", "```", "",
        "## Go on", "",
        "Train it like any model of transformers, with a new optimizer. To train only the new parts, or to give them a "
        "learning rate of their own:", "",
        "```python",
        "import json",
        f'new = json.load(open("{NEW_PARAMETERS}"))["tensors"]',
        "for name, parameter in model.named_parameters():",
        '    parameter.requires_grad_(name in new["new"])',
        "```",
    ]  # fmt: skip


def _parent_name(source: Path, config: Mapping[str, Any]) -> str:
    """The parent's name on the hub where its place or its config tells it, else the name of its directory."""
    if match := _CACHED.search(str(source.resolve())):
        return f"{match[1]}/{match[2]}"
    named = config.get("_name_or_path")
    if isinstance(named, str) and _HUB_NAME.fullmatch(named) and not Path(named).exists():
        return named
    return source.resolve().name


def _carried_fields(source: Path) -> dict[str, str]:
    """The license and the languages that a parent's card states in its front matter."""
    try:
        with open(source / CARD, encoding="utf-8") as stream:
            text = stream.read(_MOST_CARD_BYTES)
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    return {name: value.strip() for name, value in _CARRIED.findall(parts[1]) if value.strip()}
