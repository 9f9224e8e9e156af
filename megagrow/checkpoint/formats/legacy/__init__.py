"""Megatron's legacy format (`--ckpt-format torch`): one directory `mp_rank_*` per model-parallel rank."""

from megagrow.checkpoint.formats.legacy.rank_files import MODEL_FILES, ModelRank
from megagrow.checkpoint.formats.legacy.rank_models import EMBEDDING, RankGrid, rank_part
from megagrow.checkpoint.formats.legacy.read import open_legacy

__all__ = ["EMBEDDING", "RankGrid", "MODEL_FILES", "ModelRank", "rank_part", "open_legacy"]
