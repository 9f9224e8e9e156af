"""Checkpoints whose layers are not stacked, read as if they were.

Megatron-Core stacks uniform layers under one key, `decoder.layers.X` of shape [num_layers, ...]. Models that it takes
for non-uniform, and newer versions on request, have a key a layer instead: `decoder.layers.7.X`. Both hold the same
values. Here the keys of the second kind become chunks of a stacked tensor, so that nothing else needs to know.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagrow.checkpoint.torch_dist import TensorInfo

_NUMBERED = re.compile(r"^(.*decoder\.layers\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class Numbered:
    """A layer's own key, taken apart."""

    stacked: str
    layer: int


def numbered(key: str) -> Numbered | None:
    """The stacked key and the layer of a layer's own key; None for any other."""
    match = _NUMBERED.match(key)
    return Numbered(match[1] + match[3], int(match[2])) if match else None


def stack_layers(tensors: "dict[str, TensorInfo]") -> "dict[str, TensorInfo]":
    """Return an index in which layers are stacked.

    Layers of unequal shape or type, or with gaps in their numbers, are left as they are: no stacked tensor is theirs,
    and whoever looks for one will name what is missing.
    """
    stacks: dict[str, dict[int, str]] = defaultdict(dict)
    for key in tensors:
        if (found := numbered(key)) is not None:
            stacks[found.stacked][found.layer] = key
    result = dict(tensors)
    for stacked, layers in stacks.items():
        infos = [tensors[layers[layer]] for layer in sorted(layers)]
        alike = len({(info.shape, info.dtype) for info in infos}) == 1
        if not alike or sorted(layers) != list(range(len(layers))) or stacked in tensors:
            continue
        chunks = [
            replace(chunk, box=((layer, layer + 1), *chunk.box), bare=True)
            for layer, info in enumerate(infos)
            for chunk in info.chunks
        ]
        result[stacked] = replace(infos[0], shape=(len(infos), *infos[0].shape), chunks=tuple(chunks))
        for key in layers.values():
            del result[key]
    return result
