"""What a conversion into a torch_dist checkpoint should produce."""

from dataclasses import dataclass

from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan import Precision


@dataclass(frozen=True)
class TargetSpec:
    """The stage that a checkpoint becomes.

    Attributes:
        stage: name of the stage.
        shape, layout, growth, precision: of that stage.
        seed: of the random parts.
        source_shape: shape of the source, for checkpoints that do not record it.
        optimizer: also convert Adam's state.
        family: name of the family that the stage is in; None for a conversion from directory to directory.
        ignored_arguments: saved arguments that Megatron-LM does not have and the user knows to be harmless.
    """

    stage: str
    shape: ModelShape
    layout: ParallelLayout
    growth: GrowthConfig
    precision: Precision
    seed: int
    source_shape: ModelShape | None = None
    optimizer: bool = True
    family: str | None = None
    ignored_arguments: tuple[str, ...] = ()
