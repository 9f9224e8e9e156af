"""The Hugging Face format: config.json and safetensors files with transformers' names."""

from megagrow.checkpoint.formats.huggingface.config import CONFIG, choose_architecture, compose_config
from megagrow.checkpoint.formats.huggingface.new_parameters import new_parameters
from megagrow.checkpoint.formats.huggingface.placement import BoxPair, box_pairs, tensor_shapes
from megagrow.checkpoint.formats.huggingface.read import INDEX, WEIGHTS, open_huggingface, remembered_of
from megagrow.checkpoint.formats.huggingface.safetensors_header import SAFETENSORS_DTYPES, write_header
from megagrow.checkpoint.formats.huggingface.sentencepiece_files import tokenizer_files
from megagrow.checkpoint.formats.huggingface.stop_tokens import stop_tokens

__all__ = [
    "CONFIG",
    "INDEX",
    "SAFETENSORS_DTYPES",
    "WEIGHTS",
    "BoxPair",
    "box_pairs",
    "choose_architecture",
    "compose_config",
    "new_parameters",
    "open_huggingface",
    "remembered_of",
    "stop_tokens",
    "tensor_shapes",
    "tokenizer_files",
    "write_header",
]
