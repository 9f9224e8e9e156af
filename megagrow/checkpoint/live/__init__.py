"""Saves and loads a running Megatron-Core model. The only part of this room that imports Megatron."""

__all__ = ["live"]
