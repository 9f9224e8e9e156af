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
from megagrow.checkpoint.index.dtypes import DType, Raw, bytes_of, raw_of, tensor_of
from megagrow.checkpoint.index.index import Chunk, OpenCheckpoint, Source, TensorInfo

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
    "intersect",
    "raw_of",
    "row_major",
    "sizes",
    "split_evenly",
    "split_by_volume",
    "tensor_of",
    "slice_text",
    "volume",
    "whole_box",
]
