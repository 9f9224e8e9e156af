"""Every checkpoint as an index: named tensors, cut into boxes, each stored at known bytes of a file."""

from megagrow.checkpoint.index.box import (
    Box,
    intersect,
    row_major,
    sizes,
    slice_text,
    split_by_volume,
    split_evenly,
    volume,
    whole_box,
)
from megagrow.checkpoint.index.cover import check_cover
from megagrow.checkpoint.index.dtypes import DType, Raw, bytes_of, common_dtype, raw_of, tensor_of, widened
from megagrow.checkpoint.index.index import (
    Chunk,
    OpenCheckpoint,
    Source,
    TensorInfo,
    tensor_of_chunks,
)

__all__ = [
    "Box",
    "Chunk",
    "DType",
    "OpenCheckpoint",
    "Raw",
    "Source",
    "TensorInfo",
    "bytes_of",
    "check_cover",
    "common_dtype",
    "intersect",
    "raw_of",
    "row_major",
    "sizes",
    "slice_text",
    "split_by_volume",
    "split_evenly",
    "tensor_of",
    "tensor_of_chunks",
    "volume",
    "whole_box",
    "widened",
]
