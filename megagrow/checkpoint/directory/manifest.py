"""`megagrow.json`: what a checkpoint is, in plain JSON beside Megatron's files.

Shape, layout, position in the data, what it cost, and its whole ancestry: enough to resume it, to grow it and to
say where it came from, without torch and without opening a pickle.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import megagrow
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

MANIFEST = "megagrow.json"


class Ancestor(BaseModel):
    """One growth step in a checkpoint's past: from which checkpoint, by what, with which options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str
    family: str
    stage: str
    iteration: int
    shape: ModelShape
    operators: dict[str, str]
    moments: str
    noise: float
    options: GrowthConfig
    seed: int
    exact: bool
    version: str


class Manifest(BaseModel):
    """What a checkpoint is.

    Attributes:
        family, stage, iteration: whose it is; `iteration` counts the stage's own steps.
        shape, layout, precision: the model, how it was cut when this was written, and its weights' type.
        position: samples consumed of each data source since the family began.
        consumed_samples, consumed_tokens: over the whole family.
        flops: training FLOPs of this stage so far.
        optimizer: whether Adam's state is in it.
        schedule: what the stage's learning rate follows: its `Schedule`, peak and number of steps; None before its
            first step.
        threads: of each rank on CPU, where sums depend on how they are cut over threads; None elsewhere.
        lineage: growth steps, oldest first.
        version: of megagrow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    family: str
    stage: str
    iteration: int
    shape: ModelShape
    layout: ParallelLayout
    precision: str
    position: dict[str, int]
    consumed_samples: int
    consumed_tokens: int
    flops: float
    optimizer: bool = True
    schedule: dict[str, float | int | str | bool] | None = None
    threads: int | None = None
    lineage: tuple[Ancestor, ...] = ()
    version: str = megagrow.__version__


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest into its (staging) directory."""
    (path / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def read_manifest(path: Path) -> Manifest:
    """Return a checkpoint's manifest; CheckpointError if it has none or it is damaged."""
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not file.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}: not written by megagrow, so its shape is not known")
    try:
        content = json.loads(file.read_text())
        if content.get("format") != 1:
            raise CheckpointError(f"{file}: format {content.get('format')}; this megagrow reads format 1")
        return Manifest.model_validate(content)
    except (ValueError, AttributeError, ValidationError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: damaged: {' '.join(str(error).split())[:200]}") from None
