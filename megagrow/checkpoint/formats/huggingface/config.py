"""config.json and `ModelShape`, in both directions, by the table of architectures.

Reading refuses whatever changes the function and has no name in Megatron-Core, by field and value. Writing begins with
the config.json that a model came with, where there is one, and changes only the fields that no longer say what the
shape says; so what is read and written again is the same. What was written is read back before it counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagrow.checkpoint.formats.huggingface.architectures import (
    ARCHITECTURES,
    REQUIRED,
    Architecture,
    Field,
    Rope,
    number,
)
from megagrow.checkpoint.formats.huggingface.safetensors_header import parse_json
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError

CONFIG = "config.json"
_WRITING = "config.json to be written"
_MAX_BYTES = 10 << 20
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core has built in beside the factor."""
_ROPE_ATTRIBUTES = ("rotary_base", "rotary_percent", "rope_scaling_factor")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Rotary:
    """Rotary positions as a shape says them."""

    rotary_base: int
    rotary_percent: float
    rope_scaling_factor: float | None


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a directory; CheckpointError where it is missing or damaged."""
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path}: not a Hugging Face checkpoint: {CONFIG} is missing")
    if file.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{file}: refused: {file.stat().st_size} bytes are no {CONFIG}")
    return parse_json(file.read_bytes(), str(file))


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the row of a config.json's model_type; CheckpointError names those that there are."""
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    found = config.get("model_type")
    if not isinstance(found, str) or found not in known:
        raise CheckpointError(f"{where}: model_type {found!r} is not known: read are {', '.join(known)}")
    return known[found]


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape that a config.json describes; samples are as long as its positions reach.

    Raises:
        CheckpointError: a field is missing, or says something that this package's models cannot do.
    """
    architecture = architecture_of(config, where)
    known: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for field in architecture.fields:
        value, name = _read(field, config, known, where), field.attribute
        if known.setdefault(name, value) != value:
            raise CheckpointError(
                f"{where}: {said_by[name]} is {known[name]} but {field.name} is {value}: "
                f"Megatron-Core has one setting for both ({name}); make them equal"
            )
        said_by.setdefault(name, field.name)
    _check_fixed(architecture, config, where)
    if architecture.rope is not None:
        rotary = read_rope(architecture.rope, config, where)
        if rotary.rotary_percent != architecture.needs.get("rotary_percent", rotary.rotary_percent):
            raise CheckpointError(
                f"{where}: partial_rotary_factor is {rotary.rotary_percent}: {architecture.model_type} rotates whole "
                "heads; only 1.0 can be read"
            )
        known |= vars(rotary)
    _check_window(architecture, config, known, where)
    try:
        return ModelShape(**_arguments(dict(architecture.needs) | known))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(f"{where}: {place}{first['msg'].removeprefix('Value error, ')}") from None


def misfit(architecture: Architecture, shape: ModelShape) -> str | None:
    """Say why an architecture cannot express a shape; None if it can."""
    for name, wanted in architecture.needs.items():
        if getattr(shape, name) != wanted:
            return f"{name} {getattr(shape, name)}: there it is {wanted}"
    return architecture.misfit(shape)


def choose(shape: ModelShape, preferred: str | None = None) -> Architecture:
    """Return the preferred architecture if it can express a shape, else the first that can; CheckpointError if none."""
    order = sorted(ARCHITECTURES, key=lambda architecture: architecture.model_type != preferred)
    for architecture in order:
        if misfit(architecture, shape) is None:
            return architecture
    nearest = _nearest(shape)
    reason = next(misfit(architecture, shape) for architecture in order if architecture.model_type == nearest)
    raise CheckpointError(
        f"no Hugging Face architecture of {', '.join(a.model_type for a in ARCHITECTURES)} can express this shape; "
        f"{nearest} is the nearest and cannot for its {reason}"
    )


def compose(
    shape: ModelShape, architecture: Architecture, template: Mapping[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """Return the config.json of a shape.

    Args:
        shape: of the model.
        architecture: that can express it.
        template: the config.json that the model came with; None where there is none.
        dtype: of the weights, by torch's name.

    Raises:
        CheckpointError: the template has a setting that does not fit the shape.
    """
    kept = template is not None and template.get("model_type") == architecture.model_type
    config = dict(template) if template is not None and kept else _fresh(architecture, template)
    known: dict[str, Any] = {}
    for field in architecture.fields:
        value = getattr(shape, field.attribute)
        if not kept or _read(field, config, known, _WRITING) != value:
            config[field.name] = field.write(value)
        known[field.attribute] = value
    if architecture.rope is not None:
        _write_rope(architecture.rope, config, shape, kept=kept)
    if "layer_types" in config and config["layer_types"] is not None:
        config["layer_types"] = ["full_attention"] * shape.num_layers
    said = [name for name in ("dtype", "torch_dtype") if name in config]
    # Before transformers 4.56 the field was torch_dtype; later versions read both.
    config |= dict.fromkeys(said or ([] if kept else ["torch_dtype"]), dtype)
    _check_same(shape, shape_of(config, _WRITING), architecture)
    return config


def read_rope(rope: Rope, config: Mapping[str, Any], where: str) -> Rotary:
    """Return what a config.json says of rotary positions, in transformers 5's words or in those before."""
    said = config.get("rope_parameters")
    if said is not None and (not isinstance(said, dict) or any(isinstance(value, dict) for value in said.values())):
        raise CheckpointError(f"{where}: rope_parameters is {said!r}: only one set, for all layers, can be read")
    inner = dict(said or {})
    flat = {name: config[name] for name in (rope.base, rope.percent, "rope_theta", "partial_rotary_factor")
            if name in config}  # fmt: skip
    base = _agreed(inner, flat, ("rope_theta", rope.base), rope.default_base, where)
    percent = _agreed(inner, flat, ("partial_rotary_factor", rope.percent), rope.default_percent, where)
    if base != int(base):
        raise CheckpointError(f"{where}: rope_theta is {base}: Megatron's rotary_base is a whole number")
    factors = [_scaling(each, where) for each in (said, config.get("rope_scaling")) if each is not None]
    if len(set(factors)) > 1:
        raise CheckpointError(f"{where}: rope_parameters and rope_scaling disagree: remove one of them")
    return Rotary(int(base), percent, factors[0] if factors else None)


def _read(field: Field, config: Mapping[str, Any], known: Mapping[str, Any], where: str) -> Any:
    """What a config.json says in a field, as an attribute of a shape."""
    value = config.get(field.name)
    if value is None:
        if field.default is REQUIRED or (field.present and field.name not in config):
            raise CheckpointError(f"{where}: {field.name} is missing")
        if callable(field.default):
            return field.default(known)
        value = field.default
    try:
        return field.parse(value)
    except ValueError as error:
        raise CheckpointError(f"{where}: {field.name} is {value!r}: {error}") from None


def _check_fixed(architecture: Architecture, config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where a field asks for another function than the one that is built here."""
    for fixed in architecture.fixed:
        value = config.get(fixed.name, fixed.default)
        if value != fixed.value or isinstance(value, bool) != isinstance(fixed.value, bool):
            raise CheckpointError(f"{where}: {fixed.name} is {value!r}: {fixed.why}; only {fixed.value!r} can be read")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: quantization_config: only weights in F32, BF16 or F16 can be read")


def _check_window(architecture: Architecture, config: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where attention does not reach back to the first position."""
    window = config.get("sliding_window", architecture.window)
    if window is None or (architecture.model_type.startswith("qwen") and not config.get("use_sliding_window", False)):
        return
    types, first = config.get("layer_types"), config.get("max_window_layers")
    if architecture.model_type.startswith("qwen"):
        if types is not None and "sliding_attention" not in types:
            return
        if types is None and isinstance(first, int) and first >= known["num_layers"]:
            return
    if not isinstance(window, int) or window < known["positions"]:
        raise CheckpointError(
            f"{where}: sliding_window is {window} but positions go to {known['positions']}: attention is over whole "
            f"samples here; lower the positions to {window}, or set it to null if it was trained without"
        )


def _arguments(known: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ModelShape` from its attributes; what follows from others is left out."""
    vocabulary, heads = known["vocab_size"], known["num_attention_heads"]
    positions, tied, width = known.pop("positions"), known.pop("tied"), known.pop("mlp_width")
    groups, head_dim = known.pop("groups", heads), known.pop("head_dim", None)
    plain = head_dim == known["hidden_size"] / heads
    return known | {
        "seq_length": positions,
        "max_position_embeddings": positions,
        "untie_embeddings_and_output_weights": not tied,
        "ffn_hidden_size": width,
        "num_query_groups": None if groups == heads else groups,
        "kv_channels": None if plain else head_dim,
        # No row is padding, and tensor parallelism is left as many ways to cut as there are.
        "make_vocab_size_divisible_by": math.gcd(vocabulary, _VOCABULARY_MULTIPLE),
    }


def _agreed(
    inner: Mapping[str, Any], flat: Mapping[str, Any], names: tuple[str, str], default: float, where: str
) -> float:
    """The number that a setting has under every name that is there."""
    said = {f"rope_parameters.{names[0]}": inner[names[0]]} if inner.get(names[0]) is not None else {}
    said |= {name: flat[name] for name in names if flat.get(name) is not None}
    try:
        numbers = {number(value) for value in said.values()}
    except ValueError as error:
        raise CheckpointError(f"{where}: {said}: {error}") from None
    if len(numbers) > 1:
        raise CheckpointError(f"{where}: {' and '.join(said)} disagree: {sorted(numbers)}; make them equal")
    return numbers.pop() if numbers else default


def _scaling(said: Any, where: str) -> float | None:
    """The factor of Llama 3.1's scaling; None for no scaling. CheckpointError for any other kind."""
    if not isinstance(said, dict):
        raise CheckpointError(f"{where}: rope_scaling is {said!r}: keys and values are needed")
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{where}: rope_type is {kind!r}: Megatron-Core has only 'default' and 'llama3'")
    for name, wanted in _LLAMA3.items():
        if said.get(name) != wanted:
            raise CheckpointError(
                f"{where}: {name} of llama3 is {said.get(name)}: Megatron-Core has {wanted} built in; only that can be "
                "read"
            )
    try:
        return number(said.get("factor"))
    except ValueError as error:
        raise CheckpointError(f"{where}: factor of llama3 is {said.get('factor')!r}: {error}") from None


def _write_rope(rope: Rope, config: dict[str, Any], shape: ModelShape, *, kept: bool) -> None:
    """Put a shape's rotary positions into a config.json, in the words that it has or else in the ones all can read."""
    wanted = Rotary(shape.rotary_base, shape.rotary_percent, shape.rope_scaling_factor)
    if kept and read_rope(rope, config, _WRITING) == wanted:
        return
    base, percent, factor = float(wanted.rotary_base), wanted.rotary_percent, wanted.rope_scaling_factor
    scaling = None if factor is None else {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    partial = rope.default_percent != 1.0
    said: dict[str, Any] = {rope.base: base, "rope_theta": base, "rope_scaling": scaling}
    said |= {rope.percent: percent, "partial_rotary_factor": percent}
    needed = {rope.base, "rope_scaling", *([rope.percent] if partial else [])}
    if config.get("rope_parameters") is not None:
        config["rope_parameters"] = {"rope_theta": base, **(scaling or {"rope_type": "default"})}
        config["rope_parameters"] |= {"partial_rotary_factor": percent} if partial else {}
        needed = set()
    config |= {name: value for name, value in said.items() if name in config or name in needed}


def _fresh(architecture: Architecture, template: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config.json for a model that came with none of its architecture: names, tokens and what is fixed."""
    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    config |= {name: (template or {}).get(name) for name in _TOKENS}
    config |= {fixed.name: fixed.value for fixed in architecture.fixed}
    if architecture.window is not None:
        config["sliding_window"] = None
    if architecture.model_type.startswith("qwen"):
        config["use_sliding_window"] = False
    return config


def _nearest(shape: ModelShape) -> str:
    if shape.num_moe_experts is not None:
        return "mixtral"
    if shape.normalization == "RMSNorm":
        return "qwen3" if shape.qk_layernorm else "qwen2" if shape.add_qkv_bias else "llama"
    return "gpt2" if shape.position_embedding_type == "learned_absolute" else "gpt_neox"


def _check_same(shape: ModelShape, said: ModelShape, architecture: Architecture) -> None:
    """What was written must say the shape, whatever the template held."""
    rope = _ROPE_ATTRIBUTES if architecture.rope is not None else ()
    for name in (*(field.attribute for field in architecture.fields), *rope, *architecture.needs):
        assert getattr(said, name) == getattr(shape, name), (name, getattr(said, name), getattr(shape, name))
