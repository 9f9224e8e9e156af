"""Looks for NaN and infinite values in what a conversion writes, without torch and without copies.

A floating-point number is not finite if all bits of its exponent are set. As integers, these are the largest numbers of
either sign: two maxima per piece find them, at 15 to 20 GB/s on one core.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from megagrow.checkpoint.index import DType, Raw
from megagrow.errors import CheckpointError

_EXPONENT = {
    DType.FLOAT64: 0x7FF << 52,
    DType.FLOAT32: 0xFF << 23,
    DType.BFLOAT16: 0xFF << 7,
    DType.FLOAT16: 0x1F << 10,
}
_AT_ONCE = 1 << 17
"""Values that both maxima look at in turn, so that the second finds them in the cache."""


class FiniteCheck:
    """Refuses values that are not finite, or counts them if they are allowed.

    Args:
        allowed: whether to carry them over.
        source: the checkpoint that they come from, for errors.
    """

    def __init__(self, source: str = "the source", *, allowed: bool = False) -> None:
        self._source, self._allowed = source, allowed
        self._found: Counter[str] = Counter()

    def look(self, name: str, corner: tuple[int, ...], values: Raw, dtype: DType) -> None:
        """Look at some values that are about to be written.

        Args:
            name, corner: their tensor, and the index of the first of them in it.
            values, dtype: bit patterns, and the type that they are of.

        Raises:
            CheckpointError: one of them is not finite, and that is not allowed.
        """
        if dtype not in _EXPONENT or not _any_not_finite(values, _EXPONENT[dtype]):
            return
        exponent = _EXPONENT[dtype]
        bad = (values & exponent) == exponent
        count = int(bad.sum())
        if not self._allowed:
            first = np.unravel_index(int(bad.argmax()), bad.shape)
            index = [start + int(at) for start, at in zip(corner, first, strict=True)]
            limit = " (at most 65504)" if dtype is DType.FLOAT16 else ""  # the source's type may hold larger numbers
            raise CheckpointError(
                f"{self._source}: {name}: at least {count} values are NaN or infinite as {dtype}{limit}, first at "
                f"{index}; nothing was published; use a checkpoint from before that, or --allow-non-finite to carry "
                "them over"
            )
        self._found[name] += count

    def taken(self) -> Mapping[str, int]:
        """Return the number of values found in each tensor since the last call."""
        found, self._found = self._found, Counter()
        return found


def _any_not_finite(values: Raw, exponent: int) -> bool:
    flat = values.reshape(-1)
    unsigned = flat.view(f"u{flat.itemsize}")
    negative = exponent | 1 << (8 * flat.itemsize - 1)
    for start in range(0, flat.size, _AT_ONCE):
        stop = start + _AT_ONCE
        if flat[start:stop].max() >= exponent or unsigned[start:stop].max() >= negative:
            return True
    return False
