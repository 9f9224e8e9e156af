"""Width operators on one axis: hidden and ffn.

Each is its paper's rule as a table of scales per role (docs/operators.md has the formulas). With n -> N coordinates,
c(j) copies of j's source and share(j) of its effect (1/c when even):

    zero_pad   new neurons: random in, zero out. New hidden coordinates: written as zero, read at random; old
               writers times s = sqrt(N/n), old gains over s, so that the norm sees the same root mean square.
    balanced   copies. hidden: written times w = sqrt(share N / n), read times share / w; ffn: read times share.
    fpi        copies, read times share, whatever the norm makes of uneven copies.
    aki        fpi, but what writes a new coordinate comes from the next layer.
    rms_copy   copies, all read times sqrt(n/(3N-2n)) up to twice the width, n/N beyond.
    direct     old entries as they are, random ones for the rest.
    szp        old entries times lambda in a corner of zeros, plus a fresh initialization over everything.
    masked, progressive   as direct; training raises what is new from nothing.
"""

from dataclasses import dataclass

import numpy as np

from megagrow.config import GrowthConfig, ModelShape
from megagrow.errors import GrowthError
from megagrow.growth.maps import AxisMap, Exactness, Fill, Role, Scales, cyclic_copies, padded, shares
from megagrow.growth.operators.registry import operator

BERT2BERT = "bert2BERT, ACL 2022"
SPARKLING = "SPARKLING, arXiv 2602.02472"
MASKED_STRUCTURAL_GROWTH = "Masked Structural Growth, ICLR 2024"
WHEN_AND_HOW = "When and How to Grow?, ACML 2024"
WARMSTARTING = "When is Warmstarting Effective, arXiv 2605.13405"
_EVERYWHERE = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.RANDOM}


@dataclass(frozen=True)
class Resize:
    """One axis of a growth step: n -> N, the shapes it belongs to, and the options."""

    axis: str
    size: int
    target: int
    small: ModelShape
    large: ModelShape
    options: GrowthConfig


@operator("zero_pad", "ffn", exact=Exactness.ALWAYS, paper=BERT2BERT)
def zero_pad_ffn(resize: Resize) -> AxisMap:
    """New neurons are random in and zero out; the old ones stay. Exact at any ratio."""
    source, new = padded(resize.size, resize.target)
    fill = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.ZERO}
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, fill)


@operator("balanced", "ffn", exact=Exactness.ALWAYS, paper="Net2Net, ICLR 2016")
@operator("fpi", "ffn", exact=Exactness.ALWAYS, paper=BERT2BERT)
def copy_ffn(resize: Resize) -> AxisMap:
    """Neurons are copied in turn and read by their shares. Exact at any ratio."""
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    return AxisMap(resize.size, source, new, share, {Role.READ: share}, {})


@operator("zero_pad", "hidden", exact=Exactness.ALWAYS, paper="Staged Training, ICML 2022; its scales: ours")
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
    write, gain = np.where(new, 1.0, s), np.where(new, 1.0, 1.0 / s)
    share = np.ones(resize.target)
    fill = {Role.WRITE: Fill.ZERO, Role.READ: Fill.RANDOM}
    scale = _hidden_scales(share, write, gain, resize.small.tied)
    return AxisMap(resize.size, source, new, share, scale, fill, center=layer_norm)


@operator("balanced", "hidden", exact=Exactness.ALWAYS, paper=f"{BERT2BERT}; its scales: ours")
def balanced_hidden(resize: Resize) -> AxisMap:
    """Coordinates are copied so that the root mean square stays. Exact for RMSNorm at any ratio.

    Writers and readers carry the square root of the share each: only then is the gradient through the norm, too, that
    of the source times a scale. LayerNorm with uneven shares keeps the function, but not exact moments.

    Raises:
        GrowthError: LayerNorm at a non-integer ratio: uneven copies shift the mean that it subtracts.
    """
    if resize.small.normalization == "LayerNorm" and resize.target % resize.size:
        raise GrowthError(
            f"growth.hidden: balanced from {resize.size} to {resize.target} is not exact for LayerNorm at a "
            "non-integer ratio (uneven copies shift the mean); use zero_pad or an integer multiple"
        )
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    if resize.small.normalization == "LayerNorm":
        return _copied_hidden(resize, np.ones(resize.target))  # its mean needs copies of one size
    return _copied_hidden(resize, np.sqrt(share * resize.target / resize.size))


@operator("fpi", "hidden", exact=Exactness.INTEGER, paper=BERT2BERT)
def fpi_hidden(resize: Resize) -> AxisMap:
    """Coordinates are copied and read by their shares. Exact where the norm sees even copies: at integer ratios."""
    return _copied_hidden(resize, np.ones(resize.target))


@operator("aki", "hidden", "ffn", exact=Exactness.NEVER, paper=BERT2BERT)
def aki_width(resize: Resize) -> AxisMap:
    """As fpi, but what writes a new coordinate comes from the next layer (the top layer's from itself)."""
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    tied = resize.axis == "hidden" and resize.small.tied
    scale = _hidden_scales(share, np.ones(resize.target), np.ones(resize.target), tied)
    return AxisMap(resize.size, source, new, share, scale, {}, above=new)


@operator("rms_copy", "hidden", "ffn", exact=Exactness.DOUBLE, paper=SPARKLING)
def rms_copy_width(resize: Resize) -> AxisMap:
    """Copies on both sides, every reader scaled so that the root mean square of what it computes stays."""
    source, new = cyclic_copies(resize.size, resize.target)
    read = np.full(resize.target, rms_read_scale(resize.size, resize.target))
    scale = {Role.READ: read}
    if resize.axis == "hidden" and resize.small.tied:
        scale[Role.FINAL_GAIN] = scale[Role.FINAL_OFFSET] = read
    return AxisMap(resize.size, source, new, read, scale, {})


@operator("direct", "hidden", "ffn", exact=Exactness.NEVER, paper=f"baseline of {WHEN_AND_HOW}")
@operator("masked", "hidden", "ffn", exact=Exactness.MASKED, paper=MASKED_STRUCTURAL_GROWTH)
@operator("progressive", "hidden", "ffn", exact=Exactness.MASKED, paper=WHEN_AND_HOW)
def random_rest(resize: Resize) -> AxisMap:
    """Old entries stay as they are; the rest is random on both sides."""
    source, new = padded(resize.size, resize.target)
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, _EVERYWHERE)


@operator("szp", "hidden", "ffn", exact=Exactness.NEVER, paper=WARMSTARTING)
def shrink_pad_perturb(resize: Resize) -> AxisMap:
    """Old entries shrunk by lambda in a corner of zeros; a fresh initialization is added over everything."""
    source, new = padded(resize.size, resize.target)
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, {}, shrink=resize.options.shrink)


def rms_read_scale(size: int, target: int) -> float:
    """Scale of readers of `rms_copy`: sqrt(n / (3N - 2n)) up to twice the size, n / N beyond."""
    return float(np.sqrt(size / (3 * target - 2 * size))) if target <= 2 * size else size / target


def _copied_hidden(resize: Resize, write: Scales) -> AxisMap:
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    scale = _hidden_scales(share, write, np.ones(resize.target), resize.small.tied)
    return AxisMap(resize.size, source, new, share, scale, {})


def _hidden_scales(share: Scales, write: Scales, gain: Scales, tied: bool) -> dict[Role, Scales]:
    """Scales of all roles on hidden from those of writers and gains: along a path they multiply to the share.

    Where the output layer is tied to the embedding it reads what was scaled for writing, and the final norm makes up
    for the difference.
    """
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
