"""Which source gives the next sample: a fair merge that never asks how many samples there will be.

Sample j of a source with weight w is *due* at (j + 1/2) / w; the blend takes samples in the order in which they are
due (Webster's rule of apportionment). The first n choices are the same whatever follows, the counts never stray
far from their shares, and from any counts the rule goes on as if it had never stopped.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlendedSamples:
    """Samples in the order of the blend: the source of each and its number within that source, both int64 [n]."""

    source: np.ndarray
    index: np.ndarray


def blend(weights: np.ndarray, first: np.ndarray, count: int, sizes: np.ndarray | None = None) -> BlendedSamples:
    """Return the next `count` samples of a blend, or fewer where the sources hold no more.

    weights: [sources], relative. first: [sources], the next sample of each. sizes: [sources], how many samples each
    has; None: without end.
    """
    last = first + count if sizes is None else np.minimum(sizes, first + count)
    index = np.concatenate([np.arange(begin, end) for begin, end in zip(first, last, strict=True)])
    source = np.repeat(np.arange(len(weights)), np.maximum(last - first, 0))
    due = (index + 0.5) / weights[source]
    # Stable: of two samples that are due together, the one of the earlier source comes first.
    order = np.argsort(due, kind="stable")[:count]
    return BlendedSamples(source[order], index[order])
