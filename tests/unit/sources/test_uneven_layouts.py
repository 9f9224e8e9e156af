"""Experts cut otherwise than the rest, and pipelines that are divided unevenly: read, specified, and placed by rank.

That Megatron-Core divides layers so is seen in tests/distributed/checkpoint/test_layouts_read.py, where it saves them.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megagrow.checkpoint.directory import read_manifest
from megagrow.checkpoint.formats.legacy.read import open_legacy
from megagrow.checkpoint.formats.megatron_common import arguments_of, layout_of_arguments
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.index import DType
from megagrow.config import ParallelLayout
from megagrow.config.pipeline import stages_of_layout
from tests.distributed.ranks.families import verb
from tools.reference.tiny_checkpoint import SMALL, random_state, shape
from tools.reference.torch_dist_writer import Writer

SIX = SMALL | {"num_layers": 6}
MIXTURE = shape(SIX, num_moe_experts=4, moe_ffn_hidden_size=12)
DENSE = shape(SIX)
PP = {"pipeline_model_parallel_size": 2}
PP2VPP2 = PP | {"virtual_pipeline_model_parallel_size": 2}
PP3 = {"pipeline_model_parallel_size": 3}
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "first": (PP | {"decoder_first_pipeline_num_layers": 4}, [4, 2]),
    "last": (PP3 | {"decoder_last_pipeline_num_layers": 2}, [2, 2, 2]),
    "both": (PP3 | {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 1}, [3, 2, 1]),
    "first, virtual": (PP2VPP2 | {"decoder_first_pipeline_num_layers": 2}, [1, 2, 1, 2]),
    "embedding and loss": (
        PP2VPP2 | {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        [1, 2, 2, 1],
    ),
    "layout": (PP2VPP2 | {"pipeline_model_parallel_layout": "E|(t*2|)*2,ttL"}, [0, 2, 2, 2]),
}
FC2 = "decoder.layers.mlp.linear_fc2.weight"


def foreign(path: Path, of: Any, layout: dict[str, Any], **more: Any) -> Path:
    """A checkpoint of Megatron-LM, weights only, with the arguments of a layout."""
    path.mkdir()
    writer = Writer(path)
    for key, values in random_state(of, optimizer=False).items():
        writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    args = arguments_of(of, ParallelLayout(), DType.BFLOAT16)
    writer.finish({"iteration": 10, "args": Namespace(**{**args, "params_dtype": torch.bfloat16, **layout, **more})})
    return path


# issue 12: B8
@pytest.mark.parametrize("how", ["inspect", "convert", "convert --no-optimizer", "legacy", "huggingface"])
def test_experts_cut_otherwise_than_the_rest_are_no_obstacle(how: str, tmp_path: Path) -> None:
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    source = foreign(tmp_path / "source", MIXTURE, sizes, data_parallel_size=2, sequence_parallel=True)
    word, *options = how.split() if how.startswith(("inspect", "convert")) else ["convert", "--to", how]
    said = verb(word, source, *([] if word == "inspect" else [tmp_path / "made"]), *options)
    if how == "huggingface":  # it has no such model, which is what it must say
        assert "expert_tensor" not in said.text
    else:
        assert said.code == 0, said.text


# issue 12: B8
@pytest.mark.parametrize("name", CASES)
def test_uneven_pipelines_are_read_from_arguments_and_written_into_them(name: str) -> None:
    settings, counts = CASES[name]
    layout = layout_of_arguments(settings)
    assert layout == ParallelLayout(**settings)
    assert [len(layers) for layers in layout.layers_of_chunks(6)] == counts
    assert [at for layers in layout.layers_of_chunks(6) for at in layers] == list(range(6))
    args = arguments_of(DENSE, layout, DType.FLOAT32)
    assert {key: args[key] for key in settings} == settings and layout_of_arguments(args) == layout
    even = layout_of_arguments(settings | {"pipeline_model_parallel_size": 1})
    assert even == ParallelLayout(), "without a pipeline Megatron ignores them"


# issue 12: B8
@pytest.mark.parametrize("name", CASES)
def test_a_conversion_into_an_uneven_pipeline_puts_layers_where_their_rank_reads_them(
    name: str, tmp_path: Path
) -> None:
    settings, counts = CASES[name]
    source = foreign(tmp_path / "source", DENSE, {}, num_layers_per_virtual_pipeline_stage=3)
    given = [f"parallel.{key}={str(value).lower() if value is True else value}" for key, value in settings.items()]
    said = verb("convert", source, tmp_path / "made", *given)
    assert said.code == 0, said.text
    made = tmp_path / "made" / "iter_0000010"
    ranks = settings["pipeline_model_parallel_size"]
    stages = [number % ranks for number, count in enumerate(counts) for _ in range(count)]
    found = {chunk.box[0][0]: int(chunk.path.split("_")[2]) for chunk in TorchDistReader(made).tensors[FC2].chunks}
    assert [found[layer] for layer in range(6)] == stages
    assert read_manifest(made).layout == ParallelLayout(**settings)
    args = vars(torch.load(made / "common.pt", weights_only=False)["args"])
    assert {key: args[key] for key in settings} == settings and args["num_layers_per_virtual_pipeline_stage"] is None


# issue 12: B8
@pytest.mark.parametrize("name", CASES)
def test_an_export_to_the_legacy_format_is_divided_so(name: str, tmp_path: Path) -> None:
    settings, counts = CASES[name]
    source = foreign(tmp_path / "source", DENSE, {})
    given = [f"parallel.{key}={str(value).lower() if value is True else value}" for key, value in settings.items()]
    assert verb("convert", source, tmp_path / "made", "--to", "legacy", *given).code == 0
    made = tmp_path / "made" / "iter_0000010"
    opened, state = open_legacy(made), random_state(DENSE, optimizer=False)
    assert opened.layout == ParallelLayout(**settings)
    for layer in range(6):
        box = ((layer, layer + 1), *((0, size) for size in state[FC2].shape[1:]))
        assert torch.equal(opened.source.read(FC2, box)[0], state[FC2][layer])
    first = sum(count for number, count in enumerate(counts) if number % settings["pipeline_model_parallel_size"] == 0)
    rank = torch.load(made / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False)
    held = [key for name in rank if name.startswith("model") for key in rank[name] if key.endswith("fc2.weight")]
    assert len(held) == first


# issue 12: B8
def test_a_family_specifies_them(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    model = {
        "num_layers": 6, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64,
        "make_vocab_size_divisible_by": 1, "seq_length": 16, "num_moe_experts": 4, "moe_ffn_hidden_size": 30,
    }  # fmt: skip
    parallel = {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1, "data_parallel_size": 2, "pipeline_model_parallel_size": 2,
        "decoder_first_pipeline_num_layers": 4,
    }  # fmt: skip
    stage = {"name": "one", "model": model, "parallel": parallel, "train_tokens": 1024}
    stage |= {"batch": {"micro_batch_size": 2, "global_batch_size": 4}, "schedule": {"max_lr": 1e-3}}
    tree: dict[str, Any] = {"name": "f", "save": str(tmp_path / "save"), "stages": [stage]}
    tree["data"] = {"sources": [{"name": "t", "paths": [str(tmp_path / "text.jsonl")]}]}
    file = tmp_path / "family.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert verb("plan", file).code == 0
    for key, value, message in (
        ("decoder_first_pipeline_num_layers", 6, "leave 0 of num_layers 6 for 1 pipeline ranks"),
        ("account_for_loss_in_pipeline_split", "true", "exclude each other: a pipeline is divided in one way"),
        ("pipeline_model_parallel_size", 1, "decoder_first_pipeline_num_layers needs pipeline_model_parallel_size"),
        ("expert_tensor_parallel_size", 4, "expert_tensor_parallel_size 4 x expert_model_parallel_size 4 does not"),
        ("expert_model_parallel_size", 1, "which needs expert_model_parallel_size above 1"),
    ):
        said = verb("plan", file, f"stages.0.parallel.{key}={value}")
        assert said.code == 2 and message in " ".join(said.text.split()), said.text
    said = verb("plan", file, "stages.0.parallel.expert_tensor_parallel_size=null")
    assert said.code == 2 and "expert_model_parallel_size 4 does not divide data_parallel_size" in said.text


# issue 12: B8
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ett|ttL", "has 4 layers, num_layers is 6"),
        ("Etttttt", "has 1 chunks; pipeline_model_parallel_size 2"),
        ("ttt|EtttL", "must begin with its only E"),
        ("Ettt|tttmL", "has m, a layer of multi-token prediction"),
        ("Ettt|txtL", "has 'x'; known are"),
        ("(t*99999)*99999999999", "is longer than 100000 layers"),
    ],
)
def test_a_layout_that_is_none_is_refused_with_its_text(text: str, message: str, tmp_path: Path) -> None:
    source = foreign(tmp_path / "source", DENSE, {})
    given = ["parallel.pipeline_model_parallel_size=2", f"parallel.pipeline_model_parallel_layout={text}"]
    said = verb("convert", source, tmp_path / "made", *given)
    assert said.code == 2 and message in said.text


def test_a_layout_is_written_out_as_megatron_does() -> None:
    assert stages_of_layout("Ettt|(tt|)*29,|L") == ["Ettt", *["tt"] * 29, "", "L"]
    assert stages_of_layout("(Et*2|)*1L") == ["Ett", "L"]


# issue 12: B8
def test_megatron_core_divides_layers_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megagrow.model import transformer_config

    for name, (settings, _) in CASES.items():
        layout = ParallelLayout(**settings)
        virtual, ranks = layout.virtual_pipeline_model_parallel_size, layout.pipeline_model_parallel_size
        monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", virtual)
        config = transformer_config(DENSE, layout, precision="fp32")
        chosen, found = config.pipeline_model_parallel_layout, []
        for stage in range(virtual or 1):
            for rank in range(ranks):
                at = {"vp_stage": stage if virtual else None, "pp_rank": rank}
                if chosen:
                    first, count = chosen.get_layer_offset(**at), chosen.get_num_layers_to_build(**at)
                else:
                    first, count = get_transformer_layer_offset(config, **at), get_num_layers_to_build(config, **at)
                found.append(range(first, first + count))
        assert tuple(found) == layout.layers_of_chunks(6), name
