"""The Hugging Face format: config.json and safetensors files with transformers' names."""

from megagrow.checkpoint.formats.huggingface.config import CONFIG, choose_architecture, compose_config
from megagrow.checkpoint.formats.huggingface.placement import BoxPair, box_pairs, tensor_shapes
from megagrow.checkpoint.formats.huggingface.read import INDEX, WEIGHTS, open_huggingface, remembered_of
from megagrow.checkpoint.formats.huggingface.safetensors_header import SAFETENSORS_DTYPES, write_header

__all__ = [
    "CONFIG",
    "INDEX",
    "SAFETENSORS_DTYPES",
    "WEIGHTS",
    "BoxPair",
    "box_pairs",
    "choose_architecture",
    "compose_config",
    "open_huggingface",
    "remembered_of",
    "tensor_shapes",
    "write_header",
]
