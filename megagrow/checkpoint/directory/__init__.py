"""Iteration directories and the files that describe them: names, tracker, staging, integrity, manifest."""

from megagrow.checkpoint.directory.manifest import MANIFEST, Ancestor, Manifest, read_manifest, write_manifest
from megagrow.checkpoint.directory.marker import COMMON_STATE, MAX_INDEX, check_format, has_common_state

__all__ = [
    "Ancestor",
    "COMMON_STATE",
    "MANIFEST",
    "MAX_INDEX",
    "Manifest",
    "check_format",
    "has_common_state",
    "integrity",
    "iterations",
    "manifest",
    "read_manifest",
    "recovery",
    "write_manifest",
]
