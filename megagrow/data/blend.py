"""Merges sources by weight into one sequence of samples, without knowing how many samples will be needed.

Sample j of a source with weight w is *due* at (j + 1/2) / w; the blend takes samples in the order in which they are
due (Webster's rule of apportionment). The first n samples do not depend on how many follow, the counts stay close to
the weights' shares, and the blend can be resumed from any counts as if it had never stopped.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlendedSamples:
    """Samples in the order of the blend: source of each, and index within that source, both int64 [n]."""

    source: np.ndarray
    index: np.ndarray


def blend(weights: np.ndarray, first: np.ndarray, count: int, sizes: np.ndarray | None = None) -> BlendedSamples:
    """Return the next `count` samples of a blend, or fewer where the sources run out.

    Args:
        weights: relative weight of each source, [sources].
        first: index of the next sample of each source, [sources].
        count: number of samples.
        sizes: number of samples of each source, [sources]; None for endless sources.
    """
    last = first + count if sizes is None else np.minimum(sizes, first + count)
    index = np.concatenate([np.arange(begin, end) for begin, end in zip(first, last, strict=True)])
    source = np.repeat(np.arange(len(weights)), np.maximum(last - first, 0))
    due = (index + 0.5) / weights[source]
    # A stable sort: of two samples due at the same time, the one of the earlier source comes first.
    order = np.argsort(due, kind="stable")[:count]
    return BlendedSamples(source[order], index[order])


def passes(weights: dict[str, float], samples: dict[str, int], wanted: float) -> dict[str, float]:
    """Return how many times over each source is read to give `wanted` samples in all.

    Args:
        weights: relative weight of each source.
        samples: number of training samples of one epoch of each source, above 0.
        wanted: number of samples of the whole blend.
    """
    total = sum(weights.values())
    return {name: wanted * weight / total / samples[name] for name, weight in weights.items()}
