"""What every operator gets: one axis of a growth step, before its map is made."""

from dataclasses import dataclass

from megagrow.config import GrowthConfig, ModelShape


@dataclass(frozen=True)
class Resize:
    """One axis of a growth step, from n to N coordinates.

    Attributes:
        axis: hidden, ffn, head, layer, vocab or expert.
        size: n, coordinates of the source.
        target: N, coordinates of the target.
        small, large: the source and target shapes.
        options: the stage's `growth` section.
    """

    axis: str
    size: int
    target: int
    small: ModelShape
    large: ModelShape
    options: GrowthConfig
