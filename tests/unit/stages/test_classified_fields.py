"""The table that classifies the fields of a shape: complete, and compared as it says."""

from typing import Any

import pytest

from megagrow.config import ModelShape
from megagrow.config.function import FIELDS, Part, check_growth, differences
from tests.unit.stages.stage_family import large_shape

GPT: dict[str, Any] = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
    "add_bias_linear": True,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 12, "kv_channels": 4}


# issue 12: A1
def test_every_field_of_a_shape_is_classified() -> None:
    assert set(FIELDS) == set(ModelShape.model_fields), "classify the new field of ModelShape in config/function.py"


# issue 12: A1
def test_every_field_is_compared_as_it_is_classified() -> None:
    """Another value of each field is seen by exactly the part that the field belongs to."""
    dense, mixture = large_shape(), large_shape(**{**MIXTURE, "moe_ffn_hidden_size": 24})
    learned = large_shape(**{**GPT, "max_position_embeddings": 16})
    others: dict[str, Any] = {
        "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
        "vocab_size": 64, "make_vocab_size_divisible_by": 64,
    }  # fmt: skip
    for name, field in FIELDS.items():
        base = mixture if "moe" in name else learned if name in ("max_position_embeddings", "openai_gelu") else dense
        value = getattr(base, name)
        if name not in others and isinstance(value, bool):
            others[name] = not value
        elif name not in others:
            others[name] = 0.5 if name.endswith(("dropout", "percent")) else 2 * (value or 8)
        changed = ModelShape(**base.model_dump() | {name: others[name]})
        seen = [part for part in Part if differences(base, changed, part)]
        assert seen == [field.part], name


# issue 12: A1
def test_growth_by_slices_is_checked_by_the_width_of_a_slice() -> None:
    sliced = large_shape(**{"num_moe_experts": 4, "moe_ffn_hidden_size": 10})
    check_growth("growth", large_shape(), sliced, granularity=2)
    with pytest.raises(ValueError, match=r"moe_ffn_hidden_size shrinks from 20 to 10.*set growth.granularity, 1 now"):
        check_growth("growth", large_shape(), sliced, granularity=1)
