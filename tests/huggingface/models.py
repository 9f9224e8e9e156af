"""Tiny random models of every Hugging Face architecture, and how each is grown.

Weights are drawn anew for all parameters, biases and norms too, so that nothing is right by being zero or one.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SEED, SCALE, BATCH, LENGTH = 5, 0.15, 2, 48
_LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 56,
    "max_position_embeddings": 64, "use_parallel_residual": False,
}  # fmt: skip
_WIDER = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 6, "kv_channels": 8}


@dataclass(frozen=True)
class Case:
    """A model: its transformers classes' common name, its config, and what it grows into.

    Attributes:
        family: of the classes: Llama for LlamaConfig.
        config: arguments of that.
        larger: fields of the shape after growth.
        growth: operators, where not the defaults.
        written_as: model_type of the grown export.
        head: of the model class.
    """

    family: str
    config: dict[str, Any]
    larger: dict[str, Any]
    written_as: str
    growth: dict[str, Any] = field(default_factory=dict)
    head: str = "ForCausalLM"


CASES = {
    "llama": Case("Llama", _LLAMA | {"rope_parameters": _LLAMA3}, _WIDER, "llama"),
    # transformers' Llama wants heads that divide hidden_size; Mistral computes the same and does not.
    "llama at odd sizes": Case("Llama", _LLAMA, _WIDER | {"hidden_size": 40}, "mistral"),
    "llama with biases, tied": Case(
        "Llama", _LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, _WIDER, "llama"
    ),
    "qwen2": Case("Qwen2", _LLAMA | {"tie_word_embeddings": True}, _WIDER, "qwen2", {"hidden": "balanced"}),
    "qwen3": Case("Qwen3", _LLAMA | {"head_dim": 16}, _WIDER | {"kv_channels": 16, "hidden_size": 40}, "qwen3"),
    "mistral": Case(
        "Mistral", _LLAMA | {"head_dim": 12, "sliding_window": 64}, _WIDER | {"kv_channels": 12}, "mistral"
    ),
    "mixtral": Case(
        "Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, _WIDER | {"hidden_size": 40}, "mixtral"
    ),
    "gpt2": Case(
        "GPT2", _GPT2, {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 136, "num_attention_heads": 8}, "gpt2",
        {"hidden": "balanced"}, "LMHeadModel",
    ),
    "gpt2, untied": Case(
        "GPT2", _GPT2 | {"tie_word_embeddings": False, "n_inner": 72},
        {"num_layers": 3, "hidden_size": 40, "ffn_hidden_size": 88, "num_attention_heads": 5}, "gpt2",
        head="LMHeadModel",
    ),
    "gpt_neox": Case(
        "GPTNeoX", _NEOX, {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 3},
        "gpt_neox",
    ),
}  # fmt: skip


def find_transformers() -> bool:
    """Let `import transformers` work, also where it is kept beside the venv's packages; False if it is nowhere.

    Megatron-Core imports transformers where it can, which takes longer than all of its own. So `make test` keeps it in
    a directory of its own, which the ranks do not see.
    """
    beside = str(Path(sys.prefix) / "hf")
    if Path(beside).is_dir() and beside not in sys.path:
        sys.path.append(beside)
    return importlib.util.find_spec("transformers") is not None


def make(case: Case, directory: Path, **saving: Any) -> torch.Tensor:
    """Write a random model as transformers does, and return its logits [b, s, vocabulary]."""
    import transformers

    config = getattr(transformers, case.family + "Config")(**case.config)
    model = getattr(transformers, case.family + case.head)(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = float(name.endswith("weight") and ("norm" in name or ".ln_" in name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * SCALE + gain)
        model.save_pretrained(directory, **saving)
        return model(tokens(config.vocab_size)).logits


def load(directory: Path) -> tuple[torch.Tensor, int]:
    """Logits of a model as transformers reads it, and its parameters; AssertionError for a tensor too few or many."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    found = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    with torch.no_grad():
        logits = model.eval()(tokens(model.config.vocab_size)).logits
    return logits, sum(parameter.numel() for parameter in model.parameters())


def tokens(vocab_size: int) -> torch.Tensor:
    """The same tokens for every model, [b, s]."""
    return torch.randint(0, vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(SEED))
