"""What a checkpoint shall become where no family.yaml says it: a few sections and dotted overrides of them."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from megagrow.config.base import Section
from megagrow.config.family import GrowthConfig, check_shapes
from megagrow.config.load import explain, override
from megagrow.config.shape import ModelShape
from megagrow.config.stage import ParallelLayout, check_cut
from megagrow.errors import ConfigError


class ConversionRequest(Section):
    """The target of `megagrow convert SOURCE TARGET KEY=VALUE...`.

    Attributes:
        source: shape of the source; known from the source itself, unless that does not say it.
        model: shape of the target; the source's, but for what is given.
    """

    stage: str = Field("converted", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of what is made")
    source: ModelShape
    model: ModelShape
    parallel: ParallelLayout = ParallelLayout()
    growth: GrowthConfig = GrowthConfig()
    precision: Literal["bf16", "fp16", "fp32"]
    seed: int = 1234

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_shapes("growth", self.source, self.model, self.growth.granularity)
        check_cut(self.model, self.parallel)
        return self


def target_of(known: Mapping[str, Any], overrides: Iterable[str]) -> ConversionRequest:
    """Lay overrides (`model.num_layers=24`) over what is known of a source; ConfigError says what is wrong, where.

    Args:
        known: `source` (or nothing, where the source does not say it), `parallel`, `precision`.
        overrides: dotted.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        tree = override(tree, text, "convert", "model.num_layers=24")
    source = {**known.get("source", {}), **tree.get("source", {})}
    plain = {**known, **tree, "source": source, "model": {**source, **tree.get("model", {})}}
    plain["parallel"] = {**known.get("parallel", {}), **tree.get("parallel", {})} if "parallel" in tree else {}
    try:
        return ConversionRequest.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(explain(error, "convert", ConversionRequest)) from None
