"""The map of layers: the source of each target layer, and which parts of new layers are zeroed."""

from dataclasses import dataclass
from enum import Enum


class Silence(Enum):
    """The parts that are zeroed so that a new layer passes its input on."""

    NOTHING = "nothing"
    WRITERS = "residual writers"
    NORMS = "norm gains and biases"


class Inside(Enum):
    """Weights of a new layer outside the zeroed parts."""

    COPY = "copy"
    FRESH = "fresh"


@dataclass(frozen=True)
class LayerMap:
    """How layers grow.

    Attributes:
        size: number of source layers.
        source: source layer of each target layer.
        new: whether each target layer is new.
        silence: the parts of new layers that are zeroed.
        inside: the other weights of new layers: copied from their sources, or fresh.
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
