"""Depth operators: which layer of the small model each layer of the large one comes from.

identity   new layers, spread evenly, whose residual writers (linear_proj, linear_fc2 and their biases) are
           zero: they pass their input on exactly and come alive with the first gradient.
stack      the small model's layers, once more from the first on.
interpose  each layer followed by its copies.
"""

from dataclasses import dataclass
from typing import Literal

from megagrow.config import GrowthConfig
from megagrow.growth.registry import operator

Inside = Literal["copy", "fresh"]


@dataclass(frozen=True)
class LayerMap:
    """How layers grow.

    Attributes:
        size: layers of the source.
        source: source layer of each target layer.
        new: whether a target layer is new.
        silent: whether new layers have zero residual writers.
        inside: what else a new layer holds: its source's weights, or fresh ones.
    """

    size: int
    source: tuple[int, ...]
    new: tuple[bool, ...]
    silent: bool = False
    inside: Inside = "copy"

    def __len__(self) -> int:
        return len(self.source)

    @staticmethod
    def unchanged(size: int) -> "LayerMap":
        """The map of a model that keeps its depth."""
        return LayerMap(size=size, source=tuple(range(size)), new=(False,) * size)


@operator("identity", "layer", exact=True, paper="LLaMA-Pro (Wu et al., ACL 2024)")
def identity(size: int, target: int, growth: GrowthConfig) -> LayerMap:
    """New layers that pass their input on, evenly between the old ones. Exact, and alive at the first step."""
    source, new = _spread(size, target)
    return LayerMap(size=size, source=source, new=new, silent=True, inside=growth.new_layers)


@operator("interpose", "layer", exact=False, paper="Orthogonal Growth of MoE, arXiv 2510.08008")
def interpose(size: int, target: int, growth: GrowthConfig) -> LayerMap:
    """Target layer i is a copy of layer floor(i * L / L')."""
    source, new = _spread(size, target)
    return LayerMap(size=size, source=source, new=new)


@operator("stack", "layer", exact=False, paper="G_stack (Du et al., NeurIPS 2024), StackBERT (Gong et al., ICML 2019)")
def stack(size: int, target: int, growth: GrowthConfig) -> LayerMap:
    """Target layer i is a copy of layer i mod L."""
    source = tuple(index % size for index in range(target))
    return LayerMap(size=size, source=source, new=tuple(index >= size for index in range(target)))


def _spread(size: int, target: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    source = tuple(index * size // target for index in range(target))
    new = tuple(index > 0 and source[index] == source[index - 1] for index in range(target))
    return source, new
