"""Maps applied to tensors: weights, moments, and random values by address.

`grow` imports torch, so it is imported by its own name.
"""

__all__ = ["grow"]
