"""Convert config.json to `ModelShape` and back, by the table of architectures.

Reading refuses, by field and value, every setting that changes the function and that Megatron-Core does not have.
Writing starts from the config.json that the model came with, if any, and changes only the fields that no longer agree
with the shape, so reading and writing again gives the same file. The result is read back and compared with the shape.
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
    finite_number,
)
from megagrow.checkpoint.formats.huggingface.harmless_keys import HARMLESS
from megagrow.checkpoint.tensors import is_empty
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json_object

CONFIG = "config.json"
_WHILE_WRITING = "config.json to be written"
_MAX_BYTES = 10 << 20
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Parameters of llama3 scaling other than the factor, which are constants in Megatron-Core."""
_ROPE_ATTRIBUTES = ("rotary_base", "rotary_percent", "rope_scaling_factor")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_VOCABULARY_MULTIPLE = 128
_DECISIVE = ("num_moe_experts", "normalization", "qk_layernorm", "add_qkv_bias", "position_embedding_type")
"""Attributes of a shape that determine the nearest architecture, most important first."""


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of a shape."""

    rotary_base: int
    rotary_percent: float
    rope_scaling_factor: float | None


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a directory; CheckpointError if it is missing or damaged."""
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path}: not a Hugging Face checkpoint: {CONFIG} is missing")
    return read_json_object(file, _MAX_BYTES)


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the architecture of a config.json; CheckpointError if its model_type is not in the table."""
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    found = config.get("model_type")
    if not isinstance(found, str) or found not in known:
        raise CheckpointError(f"{where}: unknown model_type {found!r}; supported are {', '.join(known)}")
    return known[found]


def unknown_keys(architecture: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a config.json that no table lists and whose value turns something on, sorted."""
    known = HARMLESS | {field.name for field in architecture.fields} | {fixed.name for fixed in architecture.fixed}
    if architecture.rope is not None:
        known |= {architecture.rope.base, architecture.rope.percent}
    return sorted(name for name, value in config.items() if name not in known and not is_empty(value))


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """Return the shape that a config.json describes; samples have the length of its maximum position.

    Raises:
        CheckpointError: a field is missing, or asks for something that is not supported.
    """
    architecture = architecture_of(config, where)
    attributes: dict[str, Any] = {}
    field_of: dict[str, str] = {}
    for field in architecture.fields:
        value, name = _read(field, config, attributes, where), field.attribute
        if attributes.setdefault(name, value) != value:
            raise CheckpointError(
                f"{where}: {field_of[name]} is {attributes[name]} but {field.name} is {value}: "
                f"Megatron-Core has one setting for both ({name}); make them equal"
            )
        field_of.setdefault(name, field.name)
    _check_fixed(architecture, config, where)
    if architecture.rope is not None:
        rotary = read_rope(architecture.rope, config, where)
        if rotary.rotary_percent != architecture.needs.get("rotary_percent", rotary.rotary_percent):
            raise CheckpointError(
                f"{where}: partial_rotary_factor is {rotary.rotary_percent}: {architecture.model_type} rotates whole "
                "heads; only 1.0 is supported"
            )
        attributes |= vars(rotary)
    _check_window(architecture, config, attributes, where)
    try:
        return ModelShape(**_arguments(dict(architecture.needs) | attributes))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(f"{where}: {place}{first['msg'].removeprefix('Value error, ')}") from None


def misfit(architecture: Architecture, shape: ModelShape) -> str | None:
    """Return the reason why an architecture cannot express a shape; None if it can."""
    for name, wanted in architecture.needs.items():
        if getattr(shape, name) != wanted:
            return f"{name} {getattr(shape, name)}: it requires {wanted}"
    return architecture.misfit(shape)


def choose_architecture(shape: ModelShape, preferred: str | None = None) -> Architecture:
    """Return the preferred architecture if it can express a shape, else the first that can; CheckpointError if none."""
    order = sorted(ARCHITECTURES, key=lambda architecture: architecture.model_type != preferred)
    for architecture in order:
        if misfit(architecture, shape) is None:
            return architecture
    nearest = _nearest(shape)
    raise CheckpointError(
        f"no Hugging Face architecture of {', '.join(a.model_type for a in ARCHITECTURES)} can express this shape; "
        f"the nearest, {nearest.model_type}, cannot because of {misfit(nearest, shape)}"
    )


def compose_config(
    shape: ModelShape, architecture: Architecture, template: Mapping[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """Return the config.json for a shape.

    Args:
        shape: of the model.
        architecture: one that can express the shape.
        template: the config.json that the model came with; None if there is none.
        dtype: of the weights, by torch's name.

    Raises:
        CheckpointError: the template has a setting that does not fit the shape.
    """
    kept = template is not None and template.get("model_type") == architecture.model_type
    config = dict(template) if template is not None and kept else _fresh(architecture, template)
    attributes: dict[str, Any] = {}
    for field in architecture.fields:
        value = getattr(shape, field.attribute)
        if not kept or _read(field, config, attributes, _WHILE_WRITING) != value:
            config[field.name] = field.write(value)
        attributes[field.attribute] = value
    if architecture.rope is not None:
        _write_rope(architecture.rope, config, shape, kept=kept)
        if template is not None and any(config.get(name) != value for name, value in template.items()):
            _write_older_rope(architecture.rope, config)
    if "layer_types" in config and config["layer_types"] is not None:
        config["layer_types"] = ["full_attention"] * shape.num_layers
    present = [name for name in ("dtype", "torch_dtype") if name in config]
    # Before transformers 4.56 the field was torch_dtype; later versions read both.
    config |= dict.fromkeys(present or ([] if kept else ["torch_dtype"]), dtype)
    _check_same(shape, shape_of(config, _WHILE_WRITING), architecture)
    return config


def read_rope(rope: Rope, config: Mapping[str, Any], where: str) -> Rotary:
    """Return the rotary positions of a config.json, in the fields of transformers 5 or of earlier versions."""
    new = config.get("rope_parameters")
    if new is not None and (not isinstance(new, dict) or any(isinstance(value, dict) for value in new.values())):
        raise CheckpointError(f"{where}: rope_parameters is {new!r}: only one set for all layers is supported")
    inner = dict(new or {})
    flat = {name: config[name] for name in (rope.base, rope.percent, "rope_theta", "partial_rotary_factor")
            if name in config}  # fmt: skip
    base = _agreed(inner, flat, ("rope_theta", rope.base), rope.default_base, where)
    percent = _agreed(inner, flat, ("partial_rotary_factor", rope.percent), rope.default_percent, where)
    if base != int(base):
        raise CheckpointError(f"{where}: rope_theta is {base}: Megatron's rotary_base must be a whole number")
    factors = [_scaling(each, where) for each in (new, config.get("rope_scaling")) if each is not None]
    if len(set(factors)) > 1:
        raise CheckpointError(f"{where}: rope_parameters and rope_scaling disagree: remove one of them")
    return Rotary(int(base), percent, factors[0] if factors else None)


def _read(field: Field, config: Mapping[str, Any], attributes: Mapping[str, Any], where: str) -> Any:
    """Return the value of a field of config.json, as an attribute of a shape."""
    value = config.get(field.name)
    if value is None:
        if field.default is REQUIRED or (field.present and field.name not in config):
            raise CheckpointError(f"{where}: {field.name} is missing")
        if callable(field.default):
            return field.default(attributes)
        value = field.default
    try:
        return field.parse(value)
    except ValueError as error:
        raise CheckpointError(f"{where}: {field.name} is {value!r}: {error}") from None


def _check_fixed(architecture: Architecture, config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if a field asks for a function that is not supported."""
    for fixed in architecture.fixed:
        value = config.get(fixed.name, fixed.default)
        if value != fixed.value or isinstance(value, bool) != isinstance(fixed.value, bool):
            raise CheckpointError(f"{where}: {fixed.name} is {value!r}: {fixed.why}; only {fixed.value!r} is supported")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: quantization_config: only weights in F32, BF16 or F16 are supported")


def _check_window(
    architecture: Architecture, config: Mapping[str, Any], attributes: Mapping[str, Any], where: str
) -> None:
    """Raise CheckpointError if a sliding window keeps attention from reaching the first position."""
    window = config.get("sliding_window", architecture.window)
    if window is None:
        return
    if architecture.has_window_switch:
        if not config.get("use_sliding_window", False):
            return
        types, first = config.get("layer_types"), config.get("max_window_layers")
        if types is not None and "sliding_attention" not in types:
            return
        if types is None and isinstance(first, int) and first >= attributes["num_layers"]:
            return
    if not isinstance(window, int) or window < attributes["positions"]:
        raise CheckpointError(
            f"{where}: sliding_window is {window} but positions go to {attributes['positions']}: sliding windows are "
            f"not supported; lower the positions to {window}, or set it to null if the model was trained without one"
        )


def _arguments(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `ModelShape` for these attributes, without those that follow from others."""
    vocabulary, heads = attributes["vocab_size"], attributes["num_attention_heads"]
    positions, tied, width = attributes.pop("positions"), attributes.pop("tied"), attributes.pop("mlp_width")
    groups, head_dim = attributes.pop("groups", heads), attributes.pop("head_dim", None)
    plain = head_dim == attributes["hidden_size"] / heads
    return attributes | {
        "seq_length": positions,
        "max_position_embeddings": positions,
        "untie_embeddings_and_output_weights": not tied,
        "ffn_hidden_size": width,
        "num_query_groups": None if groups == heads else groups,
        "kv_channels": None if plain else head_dim,
        # The largest multiple that adds no padding rows, so that tensor parallelism can still divide the vocabulary.
        "make_vocab_size_divisible_by": math.gcd(vocabulary, _VOCABULARY_MULTIPLE),
    }


def _agreed(
    inner: Mapping[str, Any], flat: Mapping[str, Any], names: tuple[str, str], default: float, where: str
) -> float:
    """Return the value of a setting that may be given under several names, which must agree."""
    given = {f"rope_parameters.{names[0]}": inner[names[0]]} if inner.get(names[0]) is not None else {}
    given |= {name: flat[name] for name in names if flat.get(name) is not None}
    try:
        numbers = {finite_number(value) for value in given.values()}
    except ValueError as error:
        raise CheckpointError(f"{where}: {given}: {error}") from None
    if len(numbers) > 1:
        raise CheckpointError(f"{where}: {' and '.join(given)} disagree: {sorted(numbers)}; make them equal")
    return numbers.pop() if numbers else default


def _scaling(scaling: Any, where: str) -> float | None:
    """Return the factor of Llama 3.1's scaling; None for no scaling. CheckpointError for any other kind."""
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{where}: rope_scaling is {scaling!r}: must be keys and values")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{where}: rope_type is {kind!r}: Megatron-Core supports only 'default' and 'llama3'")
    for name, wanted in _LLAMA3.items():
        if scaling.get(name) != wanted:
            raise CheckpointError(
                f"{where}: {name} of llama3 is {scaling.get(name)}: it is constant in Megatron-Core; only {wanted} is "
                "supported"
            )
    try:
        return finite_number(scaling.get("factor"))
    except ValueError as error:
        raise CheckpointError(f"{where}: factor of llama3 is {scaling.get('factor')!r}: {error}") from None


def _write_rope(rope: Rope, config: dict[str, Any], shape: ModelShape, *, kept: bool) -> None:
    """Write a shape's rotary positions to a config.json: to the fields it has, else to those all versions read."""
    wanted = Rotary(shape.rotary_base, shape.rotary_percent, shape.rope_scaling_factor)
    if kept and read_rope(rope, config, _WHILE_WRITING) == wanted:
        return
    base, percent, factor = float(wanted.rotary_base), wanted.rotary_percent, wanted.rope_scaling_factor
    scaling = None if factor is None else {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    partial = rope.default_percent != 1.0
    values: dict[str, Any] = {rope.base: base, "rope_theta": base, "rope_scaling": scaling}
    values |= {rope.percent: percent, "partial_rotary_factor": percent}
    needed = {rope.base, "rope_scaling", *([rope.percent] if partial else [])}
    if config.get("rope_parameters") is not None:
        config["rope_parameters"] = {"rope_theta": base, **(scaling or {"rope_type": "default"})}
        config["rope_parameters"] |= {"partial_rotary_factor": percent} if partial else {}
        needed = set()
    config |= {name: value for name, value in values.items() if name in config or name in needed}


def _write_older_rope(rope: Rope, config: dict[str, Any]) -> None:
    """Write the rotary positions in the fields of transformers 4, too, which passes `rope_parameters` over.

    It would run with its default frequencies, and say nothing. A config.json that nothing else changes in stays as it
    was.
    """
    found = config.get("rope_parameters")
    if not isinstance(found, dict):
        return
    wanted = read_rope(rope, config, _WHILE_WRITING)
    older: dict[str, Any] = {rope.base: float(wanted.rotary_base)}
    if wanted.rope_scaling_factor is not None:
        older["rope_scaling"] = {"rope_type": "llama3", "factor": wanted.rope_scaling_factor, **_LLAMA3}
    if rope.default_percent != 1.0:
        older[rope.percent] = wanted.rotary_percent
    config |= {name: value for name, value in older.items() if config.get(name) is None}


def _fresh(architecture: Architecture, template: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a new config.json for a model that came without one of its architecture: names, tokens, fixed fields."""
    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    config |= {name: (template or {}).get(name) for name in _TOKENS}
    config |= {fixed.name: fixed.value for fixed in architecture.fixed}
    if architecture.window is not None:
        config["sliding_window"] = None
    if architecture.has_window_switch:
        config["use_sliding_window"] = False
    return config


def _nearest(shape: ModelShape) -> Architecture:
    """Return the architecture that agrees with a shape in the most important attributes; the first of several."""

    def disagreements(architecture: Architecture) -> list[bool]:
        needs = architecture.needs
        return [name in needs and needs[name] != getattr(shape, name) for name in _DECISIVE]

    return min(ARCHITECTURES, key=disagreements)


def _check_same(shape: ModelShape, read_back: ModelShape, architecture: Architecture) -> None:
    """Assert that a written config.json describes the shape, whatever the template contained."""
    rope = _ROPE_ATTRIBUTES if architecture.rope is not None else ()
    for name in (*(field.attribute for field in architecture.fields), *rope, *architecture.needs):
        assert getattr(read_back, name) == getattr(shape, name), (name, getattr(read_back, name), getattr(shape, name))
