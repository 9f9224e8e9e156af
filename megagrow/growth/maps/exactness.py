"""The promise of an operator: at which ratios it preserves the function."""

from enum import Enum


class Exactness(Enum):
    """When an operator preserves the function, in cases that it does not reject."""

    ALWAYS = "exact"
    INTEGER = "exact at integer ratios"
    DOUBLE = "exact at ratio 2"
    MASKED = "exact under its mask"
    NEVER = "not preserving"

    def holds(self, size: int, target: int) -> bool:
        """Whether the grown weights alone, without a mask, compute the same function from `size` to `target`."""
        if self is Exactness.INTEGER:
            return target % size == 0
        if self is Exactness.DOUBLE:
            return target == 2 * size
        return self is Exactness.ALWAYS
