"""Iteration directories and the files that describe them: names, tracker, staging, integrity, manifest."""

from megagrow.checkpoint.directory.blocks import BlockHasher, BlockSums
from megagrow.checkpoint.directory.manifest import (
    MANIFEST,
    Ancestor,
    Manifest,
    check_lineage,
    read_manifest,
    write_manifest,
)
from megagrow.checkpoint.directory.marker import COMMON_STATE, MAX_INDEX, check_format, has_common_state

__all__ = [
    "Ancestor",
    "BlockHasher",
    "BlockSums",
    "COMMON_STATE",
    "MANIFEST",
    "MAX_INDEX",
    "Manifest",
    "check_format",
    "check_lineage",
    "has_common_state",
    "integrity",
    "iterations",
    "manifest",
    "read_manifest",
    "recovery",
    "write_manifest",
]
