"""Hugging Face checkpoints, read and written by slice without a model and without transformers or safetensors.

`architectures` is the table: what config.json says of each family, and by `tensors` where its values are. `header`
knows the safetensors format, `placement` how Megatron's tensors fall into Hugging Face's, `config` turns config.json
into a shape and back, `read` opens a directory, `write` makes one.
"""

from megagrow.checkpoint.huggingface.read import REMEMBERED, open_huggingface, remembered_of
from megagrow.checkpoint.huggingface.write import HuggingFaceExport

__all__ = ["REMEMBERED", "HuggingFaceExport", "open_huggingface", "remembered_of"]
