"""Proofs: that a checkpoint is whole, and where two checkpoints differ. Both compute, so both import torch."""

__all__ = ["diff", "verify"]
