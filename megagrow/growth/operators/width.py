"""Width operators, for the axes hidden and ffn.

Each implements its paper's rule as a table of scales per role (docs/operators.md has the formulas). With n -> N
coordinates, c(j) copies of j's source and share(j) of its effect (1/c if even):

    zero_pad   new neurons: random in, zero out. New hidden coordinates: written as zero, read at random; old
               writers times s = sqrt(N/n), old gains over s, so that the norm sees the same root mean square.
    balanced   copies. hidden: written times w = sqrt(share N / n), read times share / w; ffn: read times share.
    fpi        copies, read times share, whether or not the norm sees even copies.
    aki        like fpi, but the writers of a new coordinate come from the next layer.
    rms_copy   copies, all read times sqrt(n/(3N-2n)) up to twice the width, n/N beyond.
    direct     old entries unchanged, the rest random.
    szp        old entries times lambda in a corner of zeros, plus a fresh initialization over everything.
    masked, progressive   like direct; training raises new entries from zero.
"""

import numpy as np

from megagrow.errors import GrowthError
from megagrow.growth.maps import AxisMap, Exactness, Fill, Role, Scales, cyclic_copies, padded, shares
from megagrow.growth.operators.papers import (
    BERT2BERT,
    MASKED_STRUCTURAL_GROWTH,
    SPARKLING,
    WARMSTARTING,
    WHEN_AND_HOW,
)
from megagrow.growth.operators.registry import operator
from megagrow.growth.operators.resize import Resize

_RANDOM_EVERYWHERE = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.RANDOM}


@operator("zero_pad", "ffn", exact=Exactness.ALWAYS, paper=BERT2BERT)
def zero_pad_ffn(resize: Resize) -> AxisMap:
    """New neurons are random in and zero out; old ones are unchanged. Exact at any ratio."""
    source, new = padded(resize.size, resize.target)
    fill = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.ZERO}
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, fill)


@operator("balanced", "ffn", exact=Exactness.ALWAYS, paper="Net2Net, ICLR 2016")
@operator("fpi", "ffn", exact=Exactness.ALWAYS, paper=BERT2BERT)
def copy_ffn(resize: Resize) -> AxisMap:
    """Neurons are copied in turn and read times their shares. Exact at any ratio."""
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    return AxisMap(resize.size, source, new, share, {Role.READ: share}, {})


@operator("zero_pad", "hidden", exact=Exactness.ALWAYS, paper="Staged Training, ICML 2022; its scales: ours")
def zero_pad_hidden(resize: Resize) -> AxisMap:
    """New coordinates are written as zero and read at random. Exact for RMSNorm, and for LayerNorm by centering.

    Raises:
        GrowthError: LayerNorm with tied embeddings, since centering the embedding would change the output layer.
    """
    layer_norm = resize.small.normalization == "LayerNorm"
    if layer_norm and resize.small.tied:
        raise GrowthError(
            f"growth.hidden: zero_pad from {resize.size} to {resize.target} is not exact for LayerNorm with tied "
            "embeddings (centering would change the output layer); use balanced at an integer ratio, or set "
            "untie_embeddings_and_output_weights: true"
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
    """Coordinates are copied, with scales that preserve the root mean square. Exact for RMSNorm at any ratio.

    Writers and readers each carry the square root of the share: otherwise the gradient through the norm would not be
    a multiple of the source's. With LayerNorm, uneven shares preserve the function but not exact moments.

    Raises:
        GrowthError: LayerNorm at a non-integer ratio, since uneven copies shift the mean that it subtracts.
    """
    if resize.small.normalization == "LayerNorm" and resize.target % resize.size:
        raise GrowthError(
            f"growth.hidden: balanced from {resize.size} to {resize.target} is not exact for LayerNorm at a "
            "non-integer ratio (uneven copies shift the mean); use zero_pad or an integer multiple"
        )
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    if resize.small.normalization == "LayerNorm":
        return _copied_hidden(resize, np.ones(resize.target))  # the mean needs copies of equal size
    return _copied_hidden(resize, np.sqrt(share * resize.target / resize.size))


@operator("fpi", "hidden", exact=Exactness.INTEGER, paper=BERT2BERT)
def fpi_hidden(resize: Resize) -> AxisMap:
    """Coordinates are copied and read times their shares. Exact where the norm sees even copies: at integer ratios."""
    return _copied_hidden(resize, np.ones(resize.target))


@operator("aki", "hidden", "ffn", exact=Exactness.NEVER, paper=BERT2BERT)
def aki_width(resize: Resize) -> AxisMap:
    """Like fpi, but the writers of a new coordinate come from the next layer (the top layer from itself)."""
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    tied = resize.axis == "hidden" and resize.small.tied
    scale = _hidden_scales(share, np.ones(resize.target), np.ones(resize.target), tied)
    return AxisMap(resize.size, source, new, share, scale, {}, above=new)


@operator("rms_copy", "hidden", "ffn", exact=Exactness.DOUBLE, paper=SPARKLING)
def rms_copy_width(resize: Resize) -> AxisMap:
    """Copies on both sides; readers are scaled so that the root mean square of their output is preserved."""
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
    """Old entries are unchanged; the rest are random on both sides."""
    source, new = padded(resize.size, resize.target)
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, _RANDOM_EVERYWHERE)


@operator("szp", "hidden", "ffn", exact=Exactness.NEVER, paper=WARMSTARTING)
def shrink_pad_perturb(resize: Resize) -> AxisMap:
    """Old entries times lambda in a corner of zeros, plus a fresh initialization over everything."""
    source, new = padded(resize.size, resize.target)
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, {}, shrink=resize.options.shrink)


def rms_read_scale(size: int, target: int) -> float:
    """Scale of the readers in `rms_copy`: sqrt(n / (3N - 2n)) up to twice the size, n / N beyond."""
    return float(np.sqrt(size / (3 * target - 2 * size))) if target <= 2 * size else size / target


def _copied_hidden(resize: Resize, write: Scales) -> AxisMap:
    """Every hidden coordinate is a copy, written with the scales `write`."""
    source, new = cyclic_copies(resize.size, resize.target)
    share = shares(source, new, resize.options.share_of_new)
    scale = _hidden_scales(share, write, np.ones(resize.target), resize.small.tied)
    return AxisMap(resize.size, source, new, share, scale, {})


def _hidden_scales(share: Scales, write: Scales, gain: Scales, tied: bool) -> dict[Role, Scales]:
    """Scales of all roles on hidden, from those of writers and gains: along each path they multiply to the share.

    A tied output layer reads with the scales of the embedding, which writes; the final norm compensates for that.
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
