"""A running Megatron-Core model, to and from a checkpoint. The only part of this room that imports Megatron."""

__all__ = ["live"]
