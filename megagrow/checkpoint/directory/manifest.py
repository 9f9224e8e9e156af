"""`megagrow.json`: a checkpoint's description, in plain JSON next to Megatron's files.

Shape, layout, position in the data, cost, and the whole ancestry: enough to resume it, to grow it and to trace its
origin, without torch and without opening a pickle.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import megagrow
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout, check_growth
from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json_object
from megagrow.history import StageHistory

MANIFEST = "megagrow.json"


class Ancestor(BaseModel):
    """One growth step in a checkpoint's past: its source checkpoint, operators and options.

    `exact` is the operators' promise, in real numbers; `storage` is what writing the values rounded, where known.
    """

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
    storage: str | None = None
    version: str


class Manifest(BaseModel):
    """A checkpoint's description.

    Attributes:
        family, stage, iteration: where it belongs; `iteration` counts the stage's own steps.
        shape, layout, precision: the model, the layout that it was written in, and the type of its weights.
        position: samples of each data source that the family has consumed since its start.
        consumed_samples, consumed_tokens: totals over the whole family.
        flops: training FLOPs of this stage so far.
        optimizer: whether it contains Adam's state.
        schedule: the stage's learning-rate schedule: its `Schedule`, peak and number of steps; None before its first
            step.
        threads: threads of each rank on CPU, where sums depend on how they are split over threads; None elsewhere.
        lineage: growth steps, oldest first.
        history: what made the weights of its stage, and what was spent; None if an older version wrote it.
        version: version of megagrow that wrote it.
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
    history: StageHistory | None = None
    version: str = megagrow.__version__


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest into its (staging) directory."""
    (path / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def read_manifest(path: Path) -> Manifest:
    """Return a checkpoint's manifest; CheckpointError if it is missing or damaged."""
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if not file.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}: not written by megagrow, so its shape is unknown")
    content = read_json_object(file)
    if content.get("format") != 1:
        raise CheckpointError(f"{file}: format {content.get('format')!s:.50}; this megagrow reads format 1")
    try:
        return Manifest.model_validate(content)
    except (ValueError, ValidationError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {' '.join(str(error).split())[:200]}") from None


def check_lineage(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError if a growth step in a checkpoint's past changed what growth cannot change.

    megagrow refuses such steps now, but earlier versions made them and called them exact.
    """
    shapes = [*(ancestor.shape for ancestor in manifest.lineage[1:]), manifest.shape]
    for ancestor, child in zip(manifest.lineage, shapes, strict=False):
        try:
            check_growth(f"growth from {ancestor.stage!r}", ancestor.shape, child, ancestor.options.granularity)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: its weights were grown into another model: {error}; convert {ancestor.path} again"
            ) from None
