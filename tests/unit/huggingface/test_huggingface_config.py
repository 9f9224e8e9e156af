"""config.json and shapes: what is refused and how, what an export keeps, and which architecture is chosen."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.formats.huggingface.architectures import ARCHITECTURES
from megagrow.checkpoint.formats.huggingface.config import choose_architecture, compose_config, read_config, shape_of
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError
from tests.unit.huggingface.test_huggingface import GPT, SHAPES, SIZES

ROWS = {architecture.model_type: architecture for architecture in ARCHITECTURES}
LLAMA_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_1 = LLAMA_2 | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
QWEN_2 = LLAMA_2 | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 1024, "rope_theta": 1e6}
MISTRAL = LLAMA_2 | {"model_type": "mistral", "sliding_window": None}
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "gelu",
    "rotary_pct": 0.25, "rotary_emb_base": 10000, "max_position_embeddings": 2048, "layer_norm_eps": 1e-05,
    "tie_word_embeddings": False, "use_parallel_residual": False, "torch_dtype": "float16",
}  # fmt: skip
GPT_2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
    "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02,
}  # fmt: skip
MIXTRAL = MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}


def shape_from(config: dict[str, Any], **more: Any) -> ModelShape:
    return shape_of(config | more, "config.json")


def test_llama_3_1() -> None:
    shape = shape_from(LLAMA_3_1)
    assert shape == ModelShape(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        vocab_size=128256, seq_length=131072, max_position_embeddings=131072, rotary_base=500000,
        rope_scaling_factor=8.0,
    )  # fmt: skip


def test_gpt2_and_pythia() -> None:
    gpt2, pythia = shape_from(GPT_2), shape_from(PYTHIA)
    assert gpt2.tied and gpt2.openai_gelu and gpt2.mlp_width == 3072 and gpt2.hidden_dropout == 0.1
    assert gpt2.position_embedding_type == "learned_absolute" and gpt2.positions == 1024
    assert not pythia.tied and not pythia.openai_gelu and pythia.rotary_channels == 16 and pythia.add_bias_linear


def test_old_and_new_fields_for_rotary_positions() -> None:
    new = {name: value for name, value in LLAMA_3_1.items() if name not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA_3_1["rope_scaling"]}
    assert shape_from(new) == shape_from(LLAMA_3_1)
    assert shape_from(LLAMA_2).rotary_base == 10000 and shape_from(MIXTRAL, rope_theta=None).rotary_base == 1_000_000
    old_neox = {name: value for name, value in PYTHIA.items() if not name.startswith("rotary")}
    assert shape_from(old_neox).rotary_percent == 0.25
    new_neox = old_neox | {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}}
    assert shape_from(new_neox).rotary_percent == 0.5


def test_windows_that_reach_everywhere_are_accepted() -> None:
    assert shape_from(QWEN_2).positions == 4096
    assert shape_from(QWEN_2, use_sliding_window=True, max_window_layers=32).positions == 4096
    assert shape_from(MISTRAL, sliding_window=4096).positions == 4096


@pytest.mark.parametrize(
    ("config", "changed", "expected"),
    [
        (LLAMA_2, {"model_type": "gemma"}, "unknown model_type 'gemma'; supported are llama, mistral"),
        (LLAMA_2, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA_2, {"hidden_size": 4096.0}, "hidden_size is 4096.0: must be a whole number above 0"),
        (LLAMA_2, {"num_attention_heads": 0}, "num_attention_heads is 0: must be a whole number above 0"),
        (LLAMA_2, {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5': must be a number"),
        (LLAMA_2, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1: must be true or false"),
        (LLAMA_2, {"hidden_act": "gelu"}, "hidden_act is 'gelu': the gated MLP uses SiLU; only 'silu' is supported"),
        (LLAMA_2, {"attention_bias": True}, "attention_bias is True but mlp_bias is False: Megatron-Core has one"),
        (LLAMA_2, {"num_key_value_heads": 5}, "num_query_groups 5 does not divide num_attention_heads 32"),
        (LLAMA_2, {"head_dim": 33}, "rope needs an even head_dim, not 33"),
        (LLAMA_2, {"rope_theta": 10000.5}, "rope_theta is 10000.5: Megatron's rotary_base must be a whole number"),
        (
            LLAMA_2,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'linear': Megatron-Core supports only",
        ),
        (LLAMA_2, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        (LLAMA_2, {"rope_scaling": 2.0}, "rope_scaling is 2.0: must be keys and values"),
        (LLAMA_2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: llama rotates whole heads"),
        (LLAMA_2, {"quantization_config": {"bits": 4}}, "quantization_config: only weights in F32, BF16 or F16"),
        (
            LLAMA_3_1,
            {"rope_scaling": LLAMA_3_1["rope_scaling"] | {"high_freq_factor": 2.0}},
            "high_freq_factor of llama3 is 2.0: it is constant in Megatron-Core; only 4.0",
        ),
        (
            LLAMA_3_1,
            {"rope_parameters": {"rope_theta": 10000.0}},
            "rope_parameters.rope_theta and rope_theta disagree",
        ),
        (LLAMA_3_1, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling disagree"),
        (LLAMA_2, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "only one set for all layers"),
        (MISTRAL, {"sliding_window": 1024}, "sliding_window is 1024 but positions go to 4096"),
        (QWEN_2, {"use_sliding_window": True, "max_window_layers": 31}, "sliding_window is 1024 but positions go to"),
        (
            QWEN_2,
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window is 1024",
        ),
        (QWEN_2 | {"model_type": "qwen3", "head_dim": 128}, {"attention_bias": True}, "attention_bias is True: biases"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1: the router is trained without noise"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "moe_router_topk 9 is above num_moe_experts 8"),
        (MIXTRAL, {"num_experts_per_tok": 1}, "moe_router_topk: Input should be greater than 1"),
        (
            PYTHIA,
            {"use_parallel_residual": True},
            "use_parallel_residual is True: Megatron-Core adds the attention output before",
        ),
        (PYTHIA, {"attention_bias": False}, "attention_bias is False"),
        (PYTHIA, {"hidden_act": "relu"}, "hidden_act is 'relu': only GELU is supported: gelu"),
        (PYTHIA, {"rotary_pct": 0.02}, "rotary_percent 0.02 of head_dim 64 is 1 channels"),
        (
            GPT_2,
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True: attention scores have",
        ),
        (
            GPT_2,
            {"embd_pdrop": 0.0},
            "resid_pdrop is 0.1 but embd_pdrop is 0.0: Megatron-Core has one setting for both",
        ),
        (GPT_2, {"activation_function": ["gelu"]}, "only GELU is supported"),
    ],
)
def test_settings_that_megatron_core_does_not_have_are_refused(config: dict, changed: dict, expected: str) -> None:
    shape_from(config)
    with pytest.raises(CheckpointError) as error:
        shape_from(config, **changed)
    assert str(error.value).startswith("config.json: ") and expected in str(error.value)


def test_parallel_residuals_are_the_default_and_must_be_turned_off() -> None:
    with pytest.raises(CheckpointError, match="use_parallel_residual is True"):
        shape_from({name: value for name, value in PYTHIA.items() if name != "use_parallel_residual"})


def test_a_field_whose_default_differs_between_classes_is_required() -> None:
    without = {name: value for name, value in MISTRAL.items() if name != "num_key_value_heads"}
    with pytest.raises(CheckpointError, match="num_key_value_heads is missing"):
        shape_from(without)
    assert shape_from(without, num_key_value_heads=None).groups == 32
    assert shape_from({name: value for name, value in LLAMA_2.items() if name != "num_key_value_heads"}).groups == 32


@pytest.mark.parametrize("config", [LLAMA_2, LLAMA_3_1, QWEN_2, MISTRAL, MIXTRAL, PYTHIA, GPT_2])
def test_a_config_of_an_unchanged_shape_is_unchanged(config: dict) -> None:
    row = ROWS[config["model_type"]]
    assert compose_config(shape_from(config), row, config, config.get("torch_dtype", "float32")) == config


def test_a_grown_config_changes_only_what_grew() -> None:
    types: dict[str, Any] = {"layer_types": ["full_attention"] * 32, "head_dim": None}
    shape = ModelShape(
        **shape_from(QWEN_2).model_dump()
        | {"num_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_query_groups": 8}
    )
    grown = compose_config(shape, ROWS["qwen2"], QWEN_2 | types, "bfloat16")
    assert grown == QWEN_2 | types | {
        "num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
        "layer_types": ["full_attention"] * 40, "torch_dtype": "bfloat16",
    }  # fmt: skip
    odd = shape.model_copy(update={"hidden_size": 5000, "kv_channels": 128})
    assert compose_config(odd, ROWS["qwen2"], QWEN_2 | types, "float16")["head_dim"] == 128


def test_new_rotary_positions_are_written_to_existing_fields() -> None:
    scaled = shape_from(LLAMA_2).model_copy(update={"rope_scaling_factor": 32.0, "rotary_base": 500000})
    old = compose_config(scaled, ROWS["llama"], LLAMA_2, "float16")
    assert old["rope_theta"] == 500000.0 and old["rope_scaling"]["factor"] == 32.0 and "rope_parameters" not in old
    new = {name: value for name, value in LLAMA_2.items() if name != "rope_scaling"}
    new["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    written = compose_config(scaled, ROWS["llama"], new, "float16")
    assert written["rope_parameters"] == {"rope_theta": 500000.0, **old["rope_scaling"]}
    # transformers 4 passes rope_parameters over, and would run with its defaults
    assert (written["rope_theta"], written["rope_scaling"]) == (old["rope_theta"], old["rope_scaling"])
    assert compose_config(scaled, ROWS["llama"], written, "float16") == written
    alike = {name: value for name, value in written.items() if name not in ("rope_theta", "rope_scaling")}
    assert compose_config(scaled, ROWS["llama"], alike, "float16") == alike  # what nothing changes in stays as it was
    half = shape_from(PYTHIA).model_copy(update={"rotary_percent": 0.5})
    assert compose_config(half, ROWS["gpt_neox"], PYTHIA, "float16") == PYTHIA | {
        "rotary_pct": 0.5, "rotary_emb_base": 10000.0, "rope_scaling": None,
    }  # fmt: skip


def test_a_window_that_no_longer_reaches_is_refused_at_export() -> None:
    longer = shape_from(MISTRAL).model_copy(update={"max_position_embeddings": 8192, "seq_length": 8192})
    with pytest.raises(CheckpointError, match="to be written: sliding_window is 4096 but positions go to 8192"):
        compose_config(longer, ROWS["mistral"], MISTRAL | {"sliding_window": 4096}, "float16")


@pytest.mark.parametrize("name", SHAPES)
def test_the_architecture_follows_from_the_shape(name: str) -> None:
    assert choose_architecture(SHAPES[name]).model_type == name.split()[0]


def test_an_architecture_is_kept_if_it_can_express_the_shape() -> None:
    assert choose_architecture(SHAPES["llama"], "mistral").model_type == "mistral"
    assert (
        choose_architecture(SHAPES["mistral"], "llama").model_type == "mistral"
    )  # heads do not divide its hidden size
    assert choose_architecture(SHAPES["llama with biases"], "mistral").model_type == "llama"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"normalization": "LayerNorm"}, "the nearest, gpt_neox, cannot because of swiglu True: it requires False"),
        ({"swiglu": False}, "the nearest, llama, cannot because of swiglu False: it requires True"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "the nearest, qwen3, cannot because of add_qkv_bias True"),
        (GPT | {"num_query_groups": 2}, "the nearest, gpt_neox, cannot because of num_query_groups 2: it has keys"),
        (GPT | {"kv_channels": 8}, "because of head_dim 8: it requires hidden_size / num_attention_heads"),
        (
            {"num_moe_experts": 4, "moe_shared_expert_intermediate_size": 8},
            "the nearest, mixtral, cannot because of moe_shared_expert_intermediate_size 8: it requires None",
        ),
    ],
)
def test_a_shape_that_no_architecture_can_express_is_refused(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as error:
        choose_architecture(ModelShape(**SIZES | more))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"model_type": "llama"', "damaged"),
        (b"[1]", "holds list, not keys and values"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b"[" * 100_000, "damaged"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_damaged_config_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2))
    assert read_config(tmp_path) == LLAMA_2


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"openai_gelu": True}, "openai_gelu true needs swiglu false"),
        ({"add_bias_linear": True, "add_qkv_bias": True}, "add_bias_linear already includes the biases"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5 of head_dim 6 is 3 channels: rope needs an even number"),
        (
            {"position_embedding_type": "learned_absolute", "rope_scaling_factor": 8.0},
            "rope_scaling_factor 8.0 needs position_embedding_type rope",
        ),
    ],
)
def test_invalid_shapes_are_refused(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ModelShape(**SIZES | more)
