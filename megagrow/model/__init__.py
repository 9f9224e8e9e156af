"""The one seam to Megatron-Core's models: a shape and a layout become this rank's chunks of a `GPTModel`.

`build_model` is the one door. With Transformer Engine on CUDA the layers are Megatron-Core's fused ones; without,
its local ones with our attention, rotary positions, gated activation, norms and loss. Names, shapes and slicing of
the parameters are the same either way, so a checkpoint moves freely between the two.
"""

from megagrow.model.gpt import build_model, transformer_config

__all__ = ["build_model", "transformer_config"]
