"""Random numbers by address: the value at (seed, tensor name, index) has the same bits whatever else is drawn.

This is a counter-based generator: the index is hashed with a key, and the hash becomes a normal variate. A tensor's
random parts therefore do not depend on the parallel layout, the number of workers or the order of the work, and any
slice can be generated alone. The hash is the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), and the
Box-Muller transform in float64 turns it into a normal variate.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SINE = (
    -2.3889217773452806e-08, 2.752526981229885e-06, -0.00019840861179319552,
    0.008333330974207583, -0.16666666616815567, 0.9999999999829191,
)  # fmt: skip
"""sin(x) / x up to a quarter turn, as the minimax polynomial in the square of x, computed with mpmath."""


def key(seed: int, name: str) -> np.uint64:
    """The generator's key for one tensor."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def workspace(values: int) -> NDArray[np.uint64]:
    """Reusable memory for `normal`, for up to this many values: allocating it costs more than computing them."""
    return np.empty((4, values), np.uint64)


def normal(
    generator_key: np.uint64, index: NDArray[np.uint64], work: NDArray[np.uint64] | None = None
) -> NDArray[np.float64]:
    """Standard normal variates at the given indices, in the shape of `index`; stored in `work` if it is given."""
    work = workspace(index.size) if work is None else work
    bits, spare, turns, result = (row[: index.size].reshape(index.shape) for row in work)
    radius: NDArray[np.float64] = result.view(np.float64)
    np.multiply(index, _GAMMA, out=bits)
    bits += generator_key
    _mix(bits, spare)
    # 32 bits for the angle and 32 for the radius, which is never 0
    angle = turns.view(np.float64)
    angle[...] = np.bitwise_and(bits, np.uint64(0xFFFFFFFF), out=spare)
    bits >>= np.uint64(32)
    radius[...] = bits
    radius += 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= _cosine(angle, spare.view(np.float64), bits.view(np.float64))
    return radius


def _cosine(turns: NDArray[np.float64], spare: NDArray[np.float64], result: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosine of an angle in 2^-32 turns, within 3e-11, far below float32 precision. Overwrites all arguments.

    It uses only sums and products, so its bits depend neither on the position in the array nor on the math library;
    numpy's own cosine takes three times as long. It is computed as -sin of the angle minus a quarter turn, folded into
    half a turn, where the polynomial is valid. The folding is exact, since the angles are whole numbers.
    """
    turns -= 2.0**30
    np.subtract(2.0**31, turns, out=spare)
    np.minimum(turns, spare, out=turns)
    turns *= -2.0 * np.pi * 2.0**-32
    square = np.multiply(turns, turns, out=spare)
    np.multiply(square, _SINE[0], out=result)
    for coefficient in _SINE[1:-1]:
        result += coefficient
        result *= square
    result += _SINE[-1]
    result *= turns
    return result


def _mix(bits: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
    """Hash each value in place, by the finalizer of SplitMix64."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        bits ^= np.right_shift(bits, np.uint64(shift), out=spare)
        if factor is not None:
            bits *= factor
