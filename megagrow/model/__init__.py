"""Builds Megatron-Core models: from a shape and a layout, this rank's chunks of a `GPTModel`.

`build_model` is the entry point. With Transformer Engine on CUDA the layers are Megatron-Core's fused ones; otherwise
its local ones with our attention, rotary positions, gated activation, norms and loss. Names, shapes and slicing of
the parameters are the same in both cases, so checkpoints are interchangeable.
"""

from megagrow.model.gpt import build_model, transformer_config

__all__ = ["build_model", "transformer_config"]
