"""Random numbers by address: the value at (seed, tensor name, index) is the same bits whatever else is drawn.

A counter-based generator: the index is hashed with a key, and the hash becomes a normal variate. So a tensor's
random parts do not depend on the parallel layout, on the number of workers or on the order of the work, and any
slice can be made alone. The mixer is the finalizer of SplitMix64 (Steele et al., OOPSLA 2014); the normal comes
by the Box-Muller transform in float64.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_SINE = [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(9, -1, -1)]
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(seed: int, name: str) -> np.uint64:
    """The generator's key of one named tensor."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def normal(generator_key: np.uint64, index: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal variates at the given indices, in the shape of `index`."""
    bits = _mix(index * _GAMMA + generator_key)
    # 32 bits for the radius, never 0, and 32 for the angle
    radius = ((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= _cosine((bits & np.uint64(0xFFFFFFFF)).astype(np.float64))
    return radius


def _cosine(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of an angle in 2^-32 turns, within 1e-13; overwrites its argument.

    Of sums and products alone, so it is the same bits wherever a value lies in an array and whatever library there
    is; numpy's own takes three times as long. Taken as -sin of the angle less a quarter turn, folded into half a turn
    (exactly: these are whole numbers), where the series converges.
    """
    turns -= 2.0**30
    folded = np.subtract(2.0**31, turns)
    np.minimum(turns, folded, out=turns)
    turns *= 2.0 * np.pi * 2.0**-32
    square = np.multiply(turns, turns, out=folded)
    series = np.full_like(square, _SINE[0])
    for coefficient in _SINE[1:]:
        series *= square
        series += coefficient
    series *= turns
    np.negative(series, out=series)
    return series


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    result: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return result
