"""Maps applied to tensors: weights, moments, and random values by address."""

__all__ = ["grow"]
