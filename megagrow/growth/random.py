"""Random numbers by address: the value at (seed, tensor name, index) is the same bits whatever else is drawn.

A counter-based generator: the index is hashed with a key, and the hash becomes a normal variate. So a tensor's
random parts do not depend on the parallel layout, on the number of workers or on the order of the work, and any
slice can be made alone. The mixer is the finalizer of SplitMix64 (Steele et al., OOPSLA 2014); the normal comes
by the Box-Muller transform in float64.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
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
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    np.cos(angle, out=angle)
    radius *= angle
    return radius


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    result: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return result
