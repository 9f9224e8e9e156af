"""What a conversion is asked for, as plain values: enough for any process that sees the files to plan the same work.

An order goes into the journal. Workers read it there, whoever began the conversion; a later run compares its own with
it, so nothing is ever finished under another plan than it was begun with.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import megagrow
from megagrow.checkpoint.index import DType, Source
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.plan import ConversionPlan, plan_conversion
from megagrow.growth.operators import plan_growth

Precision = Literal["bf16", "fp16", "fp32"]
Format = Literal["torch_dist", "huggingface", "legacy"]
DTYPE_OF_PRECISION = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}
REVISION = 1
"""Of the way in which targets are cut into files; a conversion that was begun under another is not gone on with."""


class Order(BaseModel):
    """A conversion.

    Attributes:
        to: format of the target; only torch_dist is grown into.
        source: checkpoint to read.
        small, large: shapes of source and target.
        growth: how the one becomes the other.
        layout, precision: of the target.
        optimizer: take Adam's state along.
        sha256: of the files in integrity.json; else a faster hash.
        seed: of the random parts.
        tokenizer: file or directory of a tokenizer that goes along, in Hugging Face's format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    to: Format = "torch_dist"
    small: ModelShape
    large: ModelShape
    growth: GrowthConfig
    layout: ParallelLayout
    precision: Precision
    optimizer: bool = True
    sha256: bool = False
    seed: int = 0
    tokenizer: Path | None = None

    def conversion(self, source: Source) -> ConversionPlan:
        """Plan it; CheckpointError where the source does not hold the tensors of its shape."""
        step = plan_growth(self.small, self.large, self.growth, self.seed)
        dtype = DTYPE_OF_PRECISION[self.precision]
        return plan_conversion(source.tensors, step, self.layout, dtype, optimizer=self.optimizer)

    def identity(self) -> dict[str, Any]:
        """All that determines the target's bytes, the source as it is now."""
        return {
            "order": self.model_dump(mode="json"),
            "source files": file_states(self.source),
            "revision": REVISION,
            "version": megagrow.__version__,
        }


def file_states(path: Path) -> dict[str, str]:
    """Size and time of change of every file of a checkpoint: what changes when somebody writes into it."""
    found = {}
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            try:
                status = file.stat()
            except OSError:  # just gone, or a link to nowhere
                continue
            found[str(file.relative_to(path))] = f"{status.st_size} bytes at {status.st_mtime_ns}"
    return found
