"""Hugging Face directories: config.json and safetensors files under transformers' names."""

from megagrow.checkpoint.formats.huggingface.config import FILE, choose, compose
from megagrow.checkpoint.formats.huggingface.placement import Part, parts, tensor_shapes
from megagrow.checkpoint.formats.huggingface.read import INDEX, WEIGHTS, open_huggingface, remembered_of
from megagrow.checkpoint.formats.huggingface.safetensors_header import DTYPES, write_header

__all__ = [
    "DTYPES",
    "FILE",
    "INDEX",
    "Part",
    "WEIGHTS",
    "choose",
    "compose",
    "open_huggingface",
    "parts",
    "remembered_of",
    "tensor_shapes",
    "write_header",
]
