"""A family.yaml of one tiny stage and its sources, for tests of stages."""

from pathlib import Path
from typing import Any

import yaml

from megagrow.config import ModelShape
from tools.reference.tiny_checkpoint import LARGE, random_state, shape, write_checkpoint


def large_shape(**others: Any) -> ModelShape:
    """The shape of the only stage, but for `others`."""
    return shape({}, **LARGE | others)


def write_family(folder: Path, model: ModelShape, **stage: Any) -> Path:
    """Write a family.yaml with one stage, `grown`, of this shape; fields at their defaults are left out."""
    fields = model.model_dump(mode="json", exclude_defaults=True)
    tree = {
        "name": "tiny",
        "save": str(folder / "runs"),
        "data": {"sources": [{"paths": ["a.txt"]}]},
        "stages": [
            {"name": "grown", "model": fields, "batch": {"micro_batch_size": 1, "global_batch_size": 1},
             "precision": "fp32", **stage},
        ],
    }  # fmt: skip
    file = folder / "family.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def write_source(folder: Path, of: ModelShape, *, optimizer: bool = False, **manifest: Any) -> Path:
    """Write a checkpoint of random fp32 weights; return its directory."""
    return write_checkpoint(folder, of, random_state(of, optimizer=optimizer), **manifest)
