"""Width operators on one axis: hidden and ffn.

Each is the paper's rule as a table of scales per role (design, section 3). With n -> N coordinates and c(j) copies
of j's source:

    zero_pad   new neurons: random in, zero out. New hidden coordinates: written as zero, read at random; old
               writers times s = sqrt(N/n), old gains over s, so that the norm sees the same root mean square.
    balanced   copies. hidden: written times sqrt(N/(n c)), read times sqrt(n/(N c)); ffn: read times 1/c.

Where the output layer is tied to the embedding it reads what was scaled for writing, so the final norm makes up
for the difference (FINAL_GAIN, FINAL_OFFSET).
"""

from dataclasses import dataclass

import numpy as np

from megagrow.config import ModelShape
from megagrow.errors import GrowthError
from megagrow.growth.axes import AxisMap, Fill, Flags, Indices, Role, Scales, cyclic_copies, multiplicity, padded
from megagrow.growth.registry import operator


@dataclass(frozen=True)
class Resize:
    """One axis of a growth step: n -> N, and the shapes it belongs to."""

    axis: str
    size: int
    target: int
    small: ModelShape
    large: ModelShape


@operator("zero_pad", "ffn", exact=True, paper="Net2Net-style zero output, bert2BERT (Chen et al., ACL 2022)")
def zero_pad_ffn(resize: Resize) -> AxisMap:
    """New neurons are random in and zero out; the old ones stay. Exact at any ratio."""
    source, new = padded(resize.size, resize.target)
    return AxisMap(
        size=resize.size,
        source=source,
        new=new,
        share=np.ones(resize.target),
        scale={},
        fill={Role.WRITE: Fill.RANDOM, Role.READ: Fill.ZERO},
    )


@operator("balanced", "ffn", exact=True, paper="Net2WiderNet (Chen et al., ICLR 2016)")
def balanced_ffn(resize: Resize) -> AxisMap:
    """Neurons are copied in turn and read by 1/c. Exact at any ratio."""
    source, new = cyclic_copies(resize.size, resize.target)
    share = 1.0 / multiplicity(source)
    return AxisMap(size=resize.size, source=source, new=new, share=share, scale={Role.READ: share}, fill={})


@operator(
    "zero_pad", "hidden", exact=True, paper="megagrow design, section 3; Staged Training (Shen et al., ICML 2022)"
)
def zero_pad_hidden(resize: Resize) -> AxisMap:
    """New coordinates are written as zero and read at random. Exact for RMSNorm, and for LayerNorm by centering.

    Raises:
        GrowthError: LayerNorm with tied embeddings: centering the embedding would change what it reads as output layer.
    """
    layer_norm = resize.small.normalization == "LayerNorm"
    if layer_norm and resize.small.tied:
        raise GrowthError(
            f"growth.hidden: zero_pad from {resize.size} to {resize.target} is not exact for LayerNorm with tied "
            "embeddings (centering would change the output layer); use balanced at an integer ratio, or untie "
            "(untie_embeddings_and_output_weights: true)"
        )
    source, new = padded(resize.size, resize.target)
    s = np.sqrt(resize.target / resize.size)
    write = np.where(new, 1.0, s)
    scale = _hidden_scales(np.ones(resize.target), write, np.where(new, 1.0, 1.0 / s), resize.small.tied)
    return _hidden_map(resize.size, source, new, np.ones(resize.target), scale, center=layer_norm)


@operator(
    "balanced", "hidden", exact=True, paper="megagrow design, section 3; FPI of bert2BERT (Chen et al., ACL 2022)"
)
def balanced_hidden(resize: Resize) -> AxisMap:
    """Coordinates are copied so that the root mean square stays. Exact for RMSNorm at any ratio.

    Raises:
        GrowthError: LayerNorm at a non-integer ratio: uneven copies shift the mean that it subtracts.
    """
    if resize.small.normalization == "LayerNorm" and resize.target % resize.size:
        raise GrowthError(
            f"growth.hidden: balanced from {resize.size} to {resize.target} is not exact for LayerNorm at a "
            "non-integer ratio (uneven copies shift the mean); use zero_pad or an integer multiple"
        )
    source, new = cyclic_copies(resize.size, resize.target)
    copies = multiplicity(source)
    write = np.sqrt(resize.target / (resize.size * copies))
    scale = _hidden_scales(1.0 / copies, write, np.ones(resize.target), resize.small.tied)
    return _hidden_map(resize.size, source, new, 1.0 / copies, scale, center=False)


def _hidden_scales(share: Scales, write: Scales, gain: Scales, tied: bool) -> dict[Role, Scales]:
    """Scales of all roles on hidden from those of writers and gains: along a path they multiply to the share."""
    read = share / (write * gain)
    final_read = write if tied else read
    return {
        Role.WRITE: write,
        Role.READ: read,
        Role.GAIN: gain,
        Role.OFFSET: share / read,
        Role.FINAL_GAIN: share / (write * final_read),
        Role.FINAL_OFFSET: share / final_read,
    }


def _hidden_map(
    size: int, source: Indices, new: Flags, share: Scales, scale: dict[Role, Scales], *, center: bool
) -> AxisMap:
    fill = {Role.WRITE: Fill.ZERO, Role.READ: Fill.RANDOM}
    return AxisMap(size=size, source=source, new=new, share=share, scale=scale, fill=fill, center=center)
