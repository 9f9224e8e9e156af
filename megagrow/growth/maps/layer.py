"""The map of layers: which source layer each target layer comes from, and what makes new ones silent."""

from dataclasses import dataclass
from enum import Enum


class Silence(Enum):
    """What makes a new layer pass its input on."""

    NOTHING = "nothing"
    WRITERS = "residual writers"
    NORMS = "norm gains and biases"


class Inside(Enum):
    """What a new layer holds where it is not silenced."""

    COPY = "copy"
    FRESH = "fresh"


@dataclass(frozen=True)
class LayerMap:
    """How layers grow.

    Attributes:
        size: layers of the source.
        source: source layer of each target layer.
        new: whether a target layer is new.
        silence: what makes new layers pass their input on.
        inside: what else a new layer holds: its source's weights, or fresh ones.
    """

    size: int
    source: tuple[int, ...]
    new: tuple[bool, ...]
    silence: Silence = Silence.NOTHING
    inside: Inside = Inside.COPY

    def __len__(self) -> int:
        return len(self.source)

    @staticmethod
    def unchanged(size: int) -> "LayerMap":
        """The map of a model that keeps its depth."""
        return LayerMap(size=size, source=tuple(range(size)), new=(False,) * size)
