"""Random values by address: normal, with the same bits in any slice."""

import random

import numpy as np

from megagrow.growth.values.random import _cosine, key, normal


def test_any_slice_has_the_same_bits() -> None:
    index = np.arange(1 << 17, dtype=np.uint64)
    whole = normal(key(3, "w"), index)
    pick = random.Random(0)
    for _ in range(300):
        length = pick.choice([1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 4097, 32768])
        start = pick.randrange(len(index) - length)
        assert np.array_equal(normal(key(3, "w"), index[start : start + length]), whole[start : start + length])
    assert np.array_equal(normal(key(3, "w"), index.reshape(64, 32, 64)).reshape(-1), whole)


def test_values_are_normal_and_independent_across_names() -> None:
    index = np.arange(1 << 20, dtype=np.uint64)
    values, other = normal(key(3, "w"), index), normal(key(3, "v"), index)
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs((values**moment).mean() - expected) < 0.02
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.005 and abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.005
    assert np.isfinite(values).all() and np.abs(values).max() > 4.5


def test_the_cosine_is_accurate() -> None:
    turns = np.concatenate([np.arange(0, 2**32, 12347), 2**30 * np.arange(4), 2**30 * np.arange(4) + 1, [2**32 - 1]])
    expected = np.cos(turns * (2 * np.pi * 2.0**-32))
    assert np.abs(_cosine(*(turns.astype(np.float64) for _ in range(3))) - expected).max() < 3e-11
