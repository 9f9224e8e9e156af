"""Hugging Face round trips with the real packages: transformers' models, Megatron-Core's, and the same numbers of both.

transformers is in this process, Megatron-Core in a rank of its own: it makes parents here, the rank imports, grows and
exports them, and here they are loaded again.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks.launcher import run_ranks
from tests.huggingface.models import CASES, find_transformers, load, make

SAME = 1e-5  # absolute, fp32, on logits of order one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all models lie: a directory a case, in it parent, again, grown and fresh."""
    if not find_transformers():
        pytest.skip("transformers is not installed: `make test` puts it into .venv/hf")
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="module")
def parents(place: Path) -> dict[str, Tensor]:
    """Logits of the parents, by transformers."""
    sharded = {"mistral": {"max_shard_size": "20KB"}}
    return {name: make(case, place / name / "parent", **sharded.get(name, {})) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(place: Path, parents: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What the rank says of all cases, from one start."""
    return run_ranks("tests.huggingface.rank:work", 1, str(place))[0]


@pytest.fixture
def result(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "error" not in found[name], found[name]["error"]
    return found[name]


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape and one.isfinite().all() and other.abs().max() > 0.5
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_megatron_core_computes_what_transformers_does(parents: dict, result: dict, name: str) -> None:
    assert difference(result["logits"], parents[name]) < SAME


@pytest.mark.parametrize("name", CASES)
def test_an_export_of_an_import_is_the_same_bit_for_bit(place: Path, result: dict, name: str) -> None:
    from safetensors.torch import load_file

    before, after = (
        {key: values for file in directory.glob("*.safetensors") for key, values in load_file(file).items()}
        for directory in (place / name / "parent", place / name / "again")
    )
    assert set(before) == set(after) and result["files"] > 1
    for key, values in before.items():
        assert values.dtype == after[key].dtype and torch.equal(values, after[key]), key
    for file in ("config.json", "generation_config.json"):
        one, other = (json.loads((place / name / which / file).read_text()) for which in ("parent", "again"))
        assert one == other


@pytest.mark.parametrize("name", CASES)
def test_a_grown_export_computes_what_the_parent_does(place: Path, parents: dict, result: dict, name: str) -> None:
    logits, parameters = load(place / name / "grown")
    assert difference(logits, parents[name]) < SAME
    assert difference(result["grown logits"], parents[name]) < SAME
    assert (result["grown as"], result["parameters"]) == (CASES[name].written_as, parameters)


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_came_from_nowhere_is_written_as_its_shape_says(
    place: Path, parents: dict, result: dict, name: str
) -> None:
    logits, _ = load(place / name / "fresh")
    assert difference(logits, parents[name]) < SAME
    # The same function: Llama where its heads divide the hidden size, else Mistral.
    assert result["fresh as"] == {"mistral": "llama"}.get(name, CASES[name].written_as)


def test_llama_3s_frequencies_are_transformers_and_megatron_cores(found: dict[str, dict[str, Any]]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    said |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=said)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = found["frequencies"]["ours"]
    assert (ours < 1.0).sum() == 63 and len(set(ours.tolist())) == 64
    for other in (theirs, found["frequencies"]["megatron"]):
        assert (ours / other - 1).abs().max() < 1e-6
