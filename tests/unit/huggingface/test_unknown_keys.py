"""Keys of a config.json that no table lists: those that may change the function are refused, others named in a note."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.formats.huggingface.config import architecture_of, unknown_keys
from tests.reference.command import error_of, megagrow
from tools.reference.tiny_checkpoint import LARGE, random_state, shape, write_checkpoint

_TOP = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40",
}
_SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "initializer_range": 0.02,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama 3.1": _SIZES | _TOP | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
        "pretraining_tp": 1, "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192},
    },
    "qwen 2.5": _SIZES | _TOP | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 28,
        "sliding_window": 131072, "use_sliding_window": False,
    },
    "qwen 3": _SIZES | _TOP | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "max_window_layers": 36, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
    },
    "mistral": _SIZES | _TOP | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 128,
    },
    "mixtral": _SIZES | _TOP | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
        "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "router_jitter_noise": 0.0,
    },
    "gpt-2": {
        "model_type": "gpt2", "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia": {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": False, "vocab_size": 50304,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_no_unknown_key(name: str) -> None:
    config = PUBLISHED[name]
    assert unknown_keys(architecture_of(config, name), config) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in Hugging Face's format."""
    root = tmp_path_factory.mktemp("exported")
    of = shape({}, **LARGE)
    done = megagrow("convert", write_checkpoint(root, of, random_state(of)), root / "hf", "--to", "huggingface")
    assert done.returncode == 0, done.stderr
    return root / "hf"


def add(exported: Path, **keys: object) -> None:
    """Set keys of the config.json and leave out those of earlier cases."""
    file = exported / "config.json"
    kept = exported.parent / "config.json"
    if not kept.is_file():
        kept.write_bytes(file.read_bytes())
    file.write_text(json.dumps(json.loads(kept.read_text()) | keys))


# issue 12: A3
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logits_scaling", 8.0), ("attention_multiplier", 0.0156), ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12.0), ("final_logit_softcapping", 30.0), ("query_pre_attn_scalar", 256),
        ("use_qk_norm", True), ("use_mup", True), ("qkv_bias", True), ("norm_topk_prob", True),
    ],
)  # fmt: skip
def test_a_key_that_may_change_the_function_is_refused(exported: Path, tmp_path: Path, key: str, value: object) -> None:
    add(exported, **{key: value})
    for command in (("inspect", exported), ("convert", exported, tmp_path / "out")):
        assert f"{key}={value}: not a key of " in error_of(megagrow(*command))
    assert not (tmp_path / "out").exists()


# issue 12: A3
def test_other_unknown_keys_are_named_and_empty_ones_passed_over(exported: Path, tmp_path: Path) -> None:
    add(exported, made_by="someone", use_qk_norm=False, logits_scaling=None)
    done = megagrow("convert", exported, tmp_path / "out")
    assert done.returncode == 0
    assert "1 key of config.json is not transformers' and taken to be harmless: made_by=someone" in done.stderr
    add(exported, logits_scaling=1.0)
    assert megagrow("inspect", exported, "--ignore-argument", "logits_scaling").returncode == 0
