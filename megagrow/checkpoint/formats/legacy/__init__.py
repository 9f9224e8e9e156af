"""Megatron's legacy format (`--ckpt-format torch`): one directory `mp_rank_*` per model-parallel rank."""

from megagrow.checkpoint.formats.legacy.rank_files import MODEL_FILES, ModelRank
from megagrow.checkpoint.formats.legacy.rank_models import EMBEDDING, Grid, local_part
from megagrow.checkpoint.formats.legacy.read import open_legacy

__all__ = ["EMBEDDING", "Grid", "MODEL_FILES", "ModelRank", "local_part", "open_legacy"]
