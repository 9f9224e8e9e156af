"""The target of a conversion without a family.yaml: a few sections, and dotted overrides of them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from megagrow.config.base import Section, Seed
from megagrow.config.family import GrowthConfig
from megagrow.config.function import check_growth
from megagrow.config.load import apply_override, first_error, refuse_ambiguous
from megagrow.config.shape import ModelShape
from megagrow.config.stage import ParallelLayout, check_sharding
from megagrow.errors import ConfigError

_MULTIPLE = "make_vocab_size_divisible_by"


class ConversionRequest(Section):
    """The target of `megagrow convert SOURCE TARGET KEY=VALUE...`.

    Attributes:
        source: shape of the source, read from the source where it stores one.
        model: shape of the target; by default that of the source.
    """

    stage: str = Field("converted", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the target")
    source: ModelShape
    model: ModelShape
    parallel: ParallelLayout = ParallelLayout()
    growth: GrowthConfig = GrowthConfig()
    precision: Literal["bf16", "fp16", "fp32"]
    seed: Seed = 1234

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_growth("growth", self.source, self.model, self.growth.granularity)
        check_sharding(self.model, self.parallel)
        return self


def given_source(overrides: Iterable[str]) -> dict[str, Any]:
    """Return the fields of the source's shape that overrides (`source.rotary_base=500000`) give."""
    tree: dict[str, Any] = {}
    for text in overrides:
        tree = apply_override(tree, text, "convert", "model.num_layers=24")
    given = tree.get("source") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"convert: source: {given!r} is not a section; write source.num_layers=24")
    return given


def source_shape(fields: Mapping[str, Any]) -> ModelShape:
    """Return the shape with these fields; ConfigError names the field at fault."""
    try:
        return ModelShape.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(first_error(error, "convert: source", ModelShape)) from None


def _with_head_dim(source: Mapping[str, Any], changed: Any) -> Any:
    """The target's model: the source's with changes. Heads keep their size, which no operator can change."""
    if not isinstance(changed, dict):
        return changed
    model = {**source, **changed}
    hidden, heads = source.get("hidden_size"), source.get("num_attention_heads")
    is_wider = any(model.get(name) != source.get(name) for name in ("hidden_size", "num_attention_heads"))
    if model.get("kv_channels") is None and is_wider and isinstance(hidden, int) and isinstance(heads, int) and heads:
        model["kv_channels"] = hidden // heads
    return model


def _with_padding(model: Any, parallel: Any, changed: Any) -> Any:
    """The target's model, its vocabulary padded so that its layout divides it, unless the padding was given."""
    if not isinstance(model, dict) or not isinstance(parallel, dict):
        return model
    if isinstance(changed, dict) and _MULTIPLE in changed:
        return model
    size, multiple = model.get("vocab_size"), model.get(_MULTIPLE, ModelShape.model_fields[_MULTIPLE].default)
    ranks = parallel.get("tensor_model_parallel_size", 1)
    if not (isinstance(size, int) and isinstance(multiple, int) and isinstance(ranks, int) and multiple > 0 < ranks):
        return model  # the error is the validator's
    if -(-size // multiple) * multiple % ranks == 0:
        return model
    return {**model, _MULTIPLE: math.lcm(multiple, ranks)}


def target_of(known: Mapping[str, Any], overrides: Iterable[str]) -> ConversionRequest:
    """Return the request that overrides (`model.num_layers=24`) make of a source; ConfigError names the key at fault.

    Args:
        known: sections read from the source: `source` (missing if it stores no shape), `parallel`, `precision`.
        overrides: dotted keys and values, which win over `known`.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        tree = apply_override(tree, text, "convert", "model.num_layers=24")
    tree = refuse_ambiguous(tree, "convert")
    source = {**known.get("source", {}), **tree.get("source", {})}
    plain = {**known, **tree, "source": source, "model": _with_head_dim(source, tree.get("model", {}))}
    plain["parallel"] = {**known.get("parallel", {}), **tree.get("parallel", {})} if "parallel" in tree else {}
    plain["model"] = _with_padding(plain["model"], plain["parallel"], tree.get("model"))
    try:
        return ConversionRequest.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(first_error(error, "convert", ConversionRequest)) from None
