"""Hugging Face directories, written and read by slice: every architecture, without transformers and without a model."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.formats.huggingface.architectures import ARCHITECTURES
from megagrow.checkpoint.formats.huggingface.read import open_huggingface, remembered_of
from megagrow.checkpoint.formats.huggingface.safetensors_header import read_header, write_header
from megagrow.checkpoint.index.box import whole_box
from megagrow.checkpoint.index.cover import check_cover
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.tensors.table import tensor_kinds
from megagrow.config import ModelShape
from megagrow.config.family import TokenizerConfig
from megagrow.convert.targets.huggingface import HuggingFaceTarget
from megagrow.data.sentencepiece_model import train_sentencepiece
from megagrow.errors import CheckpointError
from tools.reference.memory import MemoryStore

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 4, "vocab_size": 50,
    "seq_length": 16, "make_vocab_size_divisible_by": 2,
}  # fmt: skip
GPT: dict[str, Any] = {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True}
GROUPED: dict[str, Any] = {"num_query_groups": 2}
TIED: dict[str, Any] = {"untie_embeddings_and_output_weights": False}
SHAPES: dict[str, ModelShape] = {
    name: ModelShape(**SIZES | more)
    for name, more in {
        "llama": GROUPED,
        "llama with biases": GROUPED | TIED | {"add_bias_linear": True, "rope_scaling_factor": 8.0},
        "mistral": GROUPED | {"num_attention_heads": 10, "kv_channels": 6},
        "qwen2": GROUPED | TIED | {"add_qkv_bias": True},
        "qwen3": GROUPED | {"qk_layernorm": True, "kv_channels": 10},
        "mixtral": GROUPED | {"num_moe_experts": 3, "moe_ffn_hidden_size": 14},
        "gpt2": GPT | TIED | {"position_embedding_type": "learned_absolute", "openai_gelu": True},
        "gpt_neox": GPT | {"rotary_percent": 0.4},
    }.items()
}


def random_store(shape: ModelShape, dtype: torch.dtype = torch.float32) -> MemoryStore:
    """Return random canonical tensors of a shape."""
    generator = torch.Generator().manual_seed(3)
    return MemoryStore(
        {kind.key: torch.randn(kind.global_shape(shape), generator=generator).to(dtype) for kind in tensor_kinds(shape)}
    )


def write(production: HuggingFaceTarget, directory: Path) -> Path:
    """Run an export, last unit first."""
    directory.mkdir(parents=True, exist_ok=True)
    for unit in reversed(range(len(production.units))):
        ((file),) = production.units[unit]
        pieces = [bytes(piece) for number, piece in production.produce(unit) if number == 0]
        (directory / file.name).write_bytes(b"".join(pieces))
        assert (directory / file.name).stat().st_size == file.size
    production.finish(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a directory by their own names."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        for name, entry in read_header(file).items():
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry.dtype]
            values = bytearray(content[entry.offset : entry.offset + entry.length])
            found[name] = torch.frombuffer(values, dtype=dtype).reshape(entry.shape)
    return found


def put_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors to the only file of a directory."""
    head = write_header((name, DType.of(values.dtype), tuple(values.shape)) for name, values in tensors.items())
    values = [bytes(values.contiguous().view(-1).view(torch.uint8).numpy()) for values in tensors.values()]
    (directory / "model.safetensors").write_bytes(head + b"".join(values))
    return directory


def exported(directory: Path, name: str, **options: Any) -> Path:
    return write(HuggingFaceTarget(random_store(SHAPES[name]), SHAPES[name], **options), directory)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_is_read_back_under_the_same_keys(tmp_path: Path, name: str) -> None:
    shape, store = SHAPES[name], random_store(SHAPES[name])
    production = HuggingFaceTarget(store, shape, shard_bytes=4_000, piece_bytes=300)
    assert production.architecture == name.split()[0] and len(production.units) > 3
    sizes = [len(piece) for unit in range(len(production.units)) for _, piece in list(production.produce(unit))[1:]]
    assert max(sizes) <= 300 and sum(sizes) == sum(values.numel() * 4 for values in store.values.values())
    opened = open_huggingface(write(production, tmp_path))
    assert set(opened.source.tensors) == set(store.values)
    for key, info in opened.source.tensors.items():
        check_cover(key, info)
        assert torch.equal(opened.source.read(key, whole_box(info.shape)), store.values[key]), key
        box = tuple((size // 3, size) for size in info.shape)
        part = store.values[key][tuple(slice(*span) for span in box)]
        assert torch.equal(opened.source.read(key, box), part), key
    assert opened.format == f"Hugging Face ({name.split()[0]})" and opened.layout is None and not opened.notes
    assert opened.shape is not None
    again = HuggingFaceTarget(opened.source, opened.shape, remembered=remembered_of(opened.common))
    assert again.config == json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_survives_config_json(tmp_path: Path, name: str) -> None:
    shape, found = SHAPES[name], open_huggingface(exported(tmp_path, name)).shape
    assert found is not None
    own = ("seq_length", "max_position_embeddings", "moe_ffn_hidden_size", "ffn_hidden_size", "kv_channels")
    for field in ModelShape.model_fields:
        if field not in own:
            assert getattr(found, field) == getattr(shape, field), field
    for attribute in ("positions", "mlp_width", "head_dim", "padded_vocab_size"):
        assert getattr(found, attribute) == getattr(shape, attribute), attribute


def test_every_architecture_is_tested() -> None:
    assert {name.split()[0] for name in SHAPES} == {architecture.model_type for architecture in ARCHITECTURES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_to_the_requested_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    store = random_store(SHAPES["gpt2"])
    opened = open_huggingface(write(HuggingFaceTarget(store, SHAPES["gpt2"], DType.of(dtype)), tmp_path))
    for key, values in store.values.items():
        assert torch.equal(opened.source.read(key, whole_box(values.shape)), values.to(dtype)), key
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_values_that_float16_cannot_hold_are_refused() -> None:
    store = random_store(SHAPES["llama"])
    store.values["decoder.final_layernorm.weight"][3] = 1e5
    production = HuggingFaceTarget(store, SHAPES["llama"], DType.FLOAT16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: values beyond float16's range: export in bf"):
        list(production.produce(0))
    list(HuggingFaceTarget(store, SHAPES["llama"], DType.BFLOAT16).produce(0))


def test_every_tensor_keeps_its_own_type_and_is_aligned(tmp_path: Path) -> None:
    store = random_store(ModelShape(**SIZES | {"vocab_size": 51, "hidden_size": 25, "kv_channels": 6}), torch.bfloat16)
    norms = [key for key in store.values if "norm" in key]
    store.values |= {key: store.values[key].float() for key in norms}
    shape = ModelShape(**SIZES | {"vocab_size": 51, "hidden_size": 25, "kv_channels": 6})
    opened = open_huggingface(write(HuggingFaceTarget(store, shape), tmp_path))
    found = {key: info.dtype for key, info in opened.source.tensors.items()}
    assert found == {key: DType.FLOAT32 if key in norms else DType.BFLOAT16 for key in store.values}
    for entry in read_header(tmp_path / "model.safetensors").values():
        assert entry.offset % (entry.length // math.prod(entry.shape)) == 0


def test_padding_rows_are_left_out(tmp_path: Path) -> None:
    padded = ModelShape(**SIZES | {"make_vocab_size_divisible_by": 64})
    store = random_store(padded)
    opened = open_huggingface(write(HuggingFaceTarget(store, padded), tmp_path))
    assert opened.shape is not None and opened.shape.padded_vocab_size == opened.shape.vocab_size == 50
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(opened.source.read(key, whole_box((50, 24))), store.values[key][:50])


@pytest.mark.parametrize(("vocabulary", "multiple"), [(50257, 1), (32000, 128), (151936, 128), (50304, 128), (96, 32)])
def test_an_imported_vocabulary_is_not_padded(tmp_path: Path, vocabulary: int, multiple: int) -> None:
    small = {"hidden_size": 2, "num_attention_heads": 1, "ffn_hidden_size": 2, "num_layers": 1}
    shape = ModelShape(**SIZES | small | {"vocab_size": vocabulary, "make_vocab_size_divisible_by": 1})
    found = open_huggingface(write(HuggingFaceTarget(random_store(shape), shape), tmp_path)).shape
    assert found is not None
    assert (found.padded_vocab_size, found.make_vocab_size_divisible_by) == (vocabulary, multiple)


def test_a_copy_of_the_embedding_is_accepted_if_it_is_equal(tmp_path: Path) -> None:
    tensors = tensors_of(exported(tmp_path, "qwen2"))
    embedding = tensors["model.embed_tokens.weight"]
    opened = open_huggingface(put_tensors(tmp_path, tensors | {"lm_head.weight": embedding}))
    assert "output_layer.weight" not in opened.source.tensors
    assert opened.notes == (
        "lm_head.weight is a copy of model.embed_tokens.weight (tie_word_embeddings) and is left out",
    )
    put_tensors(tmp_path, tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match="differs from model.embed_tokens.weight, but tie_word_embeddings"):
        open_huggingface(tmp_path)


def test_experts_are_also_read_from_one_tensor(tmp_path: Path) -> None:
    store = random_store(SHAPES["mixtral"])
    tensors = tensors_of(exported(tmp_path, "mixtral"))
    stacked = {name: values for name, values in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(2):
        before, after = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w2, w3 = ([tensors[f"{before}experts.{e}.w{n}.weight"] for e in range(3)] for n in (1, 2, 3))
        stacked[after + "gate.weight"] = tensors[before + "gate.weight"]
        stacked[after + "experts.gate_up_proj"] = torch.cat([torch.stack(w1), torch.stack(w3)], dim=1)
        stacked[after + "experts.down_proj"] = torch.stack(w2)
    opened = open_huggingface(put_tensors(tmp_path, stacked))
    for key, values in store.values.items():
        assert torch.equal(opened.source.read(key, whole_box(values.shape)), values), key


def test_the_first_gpt2s_names_and_buffers_are_known(tmp_path: Path) -> None:
    tensors = tensors_of(exported(tmp_path, "gpt2"))
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.ones(1)}
    opened = open_huggingface(put_tensors(tmp_path, bare))
    for key, values in random_store(SHAPES["gpt2"]).values.items():
        assert torch.equal(opened.source.read(key, whole_box(values.shape)), values), key
    assert opened.notes == ("2 buffers without weights are left out",)


def test_only_fields_stored_by_an_import_are_returned() -> None:
    left = {"model_type": "llama", "config": {"vocab_size": 2}, "directory": "/models/llama"}
    assert remembered_of({"huggingface": left | {"more": 1}}) == left
    others: tuple[dict[str, Any], ...] = (
        {},
        {"huggingface": None},
        {"huggingface": left | {"directory": 1}},
        {"huggingface": {}},
    )
    for other in others:
        assert remembered_of(other) == {}


def test_small_files_are_copied(tmp_path: Path) -> None:
    origin = exported(tmp_path / "origin", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "training_args.bin"):
        (origin / name).write_text(f'"{name}"')
    opened = open_huggingface(origin)
    assert opened.shape is not None
    again = HuggingFaceTarget(opened.source, opened.shape, remembered=remembered_of(opened.common))
    files = sorted(file.name for file in write(again, tmp_path / "again").iterdir())
    assert files == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not again.notes
    own = tmp_path / "own" / "tokens.model"
    own.parent.mkdir()
    own.write_bytes(train_sentencepiece(iter(["a few words of text"] * 9), TokenizerConfig(), 300, 0))
    other = HuggingFaceTarget(opened.source, opened.shape, remembered=remembered_of(opened.common), tokenizer=own)
    found = write(other, tmp_path / "other")
    assert (found / "tokenizer.model").read_bytes() == own.read_bytes() and not other.notes
    assert json.loads((found / "tokenizer.json").read_text())["model"]["type"] == "BPE"  # made from it
    assert json.loads((found / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert (found / "generation_config.json").read_text() == '"generation_config.json"'
    (said,) = HuggingFaceTarget(opened.source, opened.shape, tokenizer=tmp_path / "none").notes
    assert said == f"no tokenizer files are found in {tmp_path / 'none'}: copy them next to config.json yourself"


def test_an_export_needs_all_of_its_source() -> None:
    shape, store = SHAPES["llama"], random_store(SHAPES["llama"])
    kept = store.values.pop("decoder.final_layernorm.weight")
    with pytest.raises(CheckpointError, match="decoder.final_layernorm.weight is missing"):
        HuggingFaceTarget(store, shape)
    store.values["decoder.final_layernorm.weight"] = kept[:-1]
    with pytest.raises(CheckpointError, match=r"has shape \(23,\), the model's is \(24,\)"):
        HuggingFaceTarget(store, shape)
    store.values["decoder.final_layernorm.weight"] = kept.double()
    with pytest.raises(CheckpointError, match=r"model.norm.weight is float64: choose a dtype"):
        HuggingFaceTarget(store, shape)
    HuggingFaceTarget(store, shape, DType.FLOAT32)
