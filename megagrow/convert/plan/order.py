"""The order of a conversion, as plain values: any process that sees the files can plan the same work from it.

The order is stored in the journal. Workers read it there, no matter which process started the conversion. A later run
compares its own order with it, so that a conversion is only finished under the plan that it was started with.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import megagrow
from megagrow.checkpoint.index import DType, Source
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.masters import differing_master, has_masters
from megagrow.convert.plan.plan import ConversionPlan, plan_conversion
from megagrow.errors import CheckpointError
from megagrow.growth.operators import plan_growth

Precision = Literal["bf16", "fp16", "fp32"]
Format = Literal["torch_dist", "huggingface", "legacy"]
DTYPE_OF_PRECISION = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}
REVISION = 2
"""Version of how targets are cut into files. A conversion started under another version is not resumed."""


class Order(BaseModel):
    """All settings of a conversion that determine its result.

    Attributes:
        source: checkpoint to read.
        to: format of the target; growth needs torch_dist.
        small, large: shapes of source and target.
        growth: operators and their options.
        layout, precision: of the target.
        optimizer: also convert Adam's state.
        sha256: use sha256 in integrity.json instead of a faster hash.
        seed: of the random parts.
        tokenizer: tokenizer file or directory to copy into a Hugging Face target.
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
        """Plan the conversion; CheckpointError if the source does not hold exactly the tensors of its shape."""
        step = plan_growth(self.small, self.large, self.growth, self.seed)
        dtype = DTYPE_OF_PRECISION[self.precision]
        masters = has_masters(source.tensors, self.small)
        differing = differing_master(source, self.small) if masters else None
        if differing is not None and self.optimizer:
            raise CheckpointError(
                f"{differing}: the weights are not the optimizer's masters, so one of them is wrong (Megatron-Core "
                "saves masters shifted where an optimizer has several padded buckets); --no-optimizer takes the weights"
            )
        return plan_conversion(
            source.tensors,
            step,
            self.layout,
            dtype,
            optimizer=self.optimizer,
            masters=masters and differing is None,
        )

    def identity(self) -> dict[str, Any]:
        """Everything that determines the target's bytes, including the present state of the source's files."""
        return {
            "order": self.model_dump(mode="json"),
            "source files": file_states(self.source),
            "revision": REVISION,
            "version": megagrow.__version__,
        }


def file_states(path: Path) -> dict[str, str]:
    """Size and modification time of every file of a checkpoint, to notice when one is written to."""
    found = {}
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            try:
                status = file.stat()
            except OSError:  # removed meanwhile, or a dangling link
                continue
            found[str(file.relative_to(path))] = f"{status.st_size} bytes at {status.st_mtime_ns}"
    return found
