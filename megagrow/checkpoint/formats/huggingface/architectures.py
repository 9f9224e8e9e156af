"""The table of Hugging Face architectures: a row says what it can express, how config.json says it, and its tensors.

Another architecture is one more row, as long as Megatron-Core has the model. `needs` are the properties of a shape that
the architecture takes for granted, `fields` what config.json says of the rest, `fixed` what config.json must say.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megagrow.checkpoint.formats.huggingface import names
from megagrow.checkpoint.formats.huggingface.placement import TableRow
from megagrow.config import ModelShape

Values = Mapping[str, Any]
REQUIRED = object()
"""Default of a field that must be there."""
_EXACT_GELU = ("gelu", "gelu_python")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate")


def whole(value: Any) -> int:
    """A whole number above 0."""
    if type(value) is not int or value <= 0:
        raise ValueError("a whole number above 0 is needed")
    return value


def number(value: Any) -> float:
    """Any finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a number is needed")
    return float(value)


def flag(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise ValueError("true or false is needed")
    return value


def gelu(value: Any) -> bool:
    """A name of GELU: whether it means the tanh approximation (`openai_gelu`)."""
    if value not in (*_EXACT_GELU, *_TANH_GELU):
        raise ValueError(f"only GELU can be read: {', '.join((*_EXACT_GELU, *_TANH_GELU))}")
    return value in _TANH_GELU


@dataclass(frozen=True)
class Field:
    """A field of config.json.

    Attributes:
        name: in config.json.
        attribute: of `ModelShape` that it says.
        parse: from JSON to the attribute; ValueError says what would do.
        default: what null means, and absence too unless `present`; a function gets the attributes known so far.
        present: whether it must not be absent, since there absence means a number that differs from class to class.
    """

    name: str
    attribute: str
    parse: Callable[[Any], Any]
    default: Any = REQUIRED
    present: bool = False

    def write(self, value: Any) -> Any:
        """The attribute as config.json says it."""
        return ("gelu_new" if value else "gelu") if self.parse is gelu else value


@dataclass(frozen=True)
class Fixed:
    """A field of config.json that must have a value, for anything else is another function.

    Attributes:
        name: in config.json.
        value: the only one that can be read; written too.
        default: what absence means.
        why: what the model room lacks.
    """

    name: str
    value: Any
    default: Any
    why: str


@dataclass(frozen=True)
class Rope:
    """How an architecture's config.json speaks of rotary positions, before transformers 5: names and defaults."""

    base: str = "rope_theta"
    percent: str = "partial_rotary_factor"
    default_base: float = 10000.0
    default_percent: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        model_type, class_name: as config.json has them.
        needs: values of a shape's attributes that it takes for granted.
        fields, fixed: of config.json.
        rope: of config.json; None where positions are learned.
        window: default of `sliding_window`; None where there is no such field or it means none.
        variants: its tensors by canonical key, one table for each set of names that is found; the first is written.
        misfit: what else keeps a shape from being expressed; None if nothing.
        ignored: buffers of old versions that hold no weights, as patterns.
        output: name of the output layer's tensor.
    """

    model_type: str
    class_name: str
    needs: Values
    fields: tuple[Field, ...]
    fixed: tuple[Fixed, ...]
    rope: Rope | None
    variants: tuple[Mapping[str, TableRow], ...]
    output: str
    window: int | None = None
    misfit: Callable[[ModelShape], str | None] = lambda shape: None
    ignored: tuple[str, ...] = ()


_LLAMA_NEEDS = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "swiglu": True,
    "num_moe_experts": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
_GPT_NEEDS = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "qk_layernorm": False,
    "num_moe_experts": None,
}


def _sizes(hidden: str, layers: str, heads: str, positions: str) -> tuple[Field, ...]:
    return (
        Field("vocab_size", "vocab_size", whole),
        Field(hidden, "hidden_size", whole),
        Field(layers, "num_layers", whole),
        Field(heads, "num_attention_heads", whole),
        Field(positions, "positions", whole),
        Field("initializer_range", "init_method_std", number, 0.02),
    )


_SIZES = _sizes("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def _llama_fields(*, present: bool, epsilon: float = 1e-6, head_dim_present: bool = False) -> tuple[Field, ...]:
    return (
        *_SIZES,
        Field("intermediate_size", "mlp_width", whole),
        Field("num_key_value_heads", "groups", whole, lambda known: known["num_attention_heads"], present),
        Field(
            "head_dim", "head_dim", whole,
            lambda known: known["hidden_size"] // known["num_attention_heads"], head_dim_present,
        ),
        Field("rms_norm_eps", "layernorm_epsilon", number, epsilon),
        Field("attention_dropout", "attention_dropout", number, 0.0),
        Field("tie_word_embeddings", "tied", flag, False),
    )  # fmt: skip


_SILU = Fixed("hidden_act", "silu", "silu", "the gated MLP has SiLU")
_NO_ATTENTION_BIAS = Fixed(
    "attention_bias", False, False, "biases of queries, keys and values come with one of the output projection"
)
_LLAMA_IGNORED = (r"\.rotary_emb\.inv_freq$",)


def _one_head_size(shape: ModelShape) -> str | None:
    if shape.groups != shape.num_attention_heads:
        return f"num_query_groups {shape.groups}: every head has its own keys and values there"
    if shape.num_attention_heads * shape.head_dim != shape.hidden_size:
        return f"head_dim {shape.head_dim}: there it is hidden_size / num_attention_heads"
    return None


def _divides(shape: ModelShape) -> str | None:
    if shape.hidden_size % shape.num_attention_heads:
        return f"num_attention_heads {shape.num_attention_heads}, which does not divide hidden_size {shape.hidden_size}"
    return None


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        needs={name: value for name, value in _LLAMA_NEEDS.items() if name != "add_bias_linear"},
        fields=(
            *_llama_fields(present=False),
            Field("attention_bias", "add_bias_linear", flag, False),
            Field("mlp_bias", "add_bias_linear", flag, False),
        ),
        fixed=(_SILU,),
        rope=Rope(),
        variants=(names.llama_attention() | names.llama_mlp(),),
        output="lm_head.weight",
        misfit=_divides,
        ignored=_LLAMA_IGNORED,
    ),
    Architecture(
        model_type="mistral",
        class_name="MistralForCausalLM",
        needs=_LLAMA_NEEDS,
        fields=_llama_fields(present=True),
        fixed=(_SILU,),
        rope=Rope(),
        variants=(names.llama_attention() | names.llama_mlp(),),
        output="lm_head.weight",
        window=4096,
        ignored=_LLAMA_IGNORED,
    ),
    Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        needs=_LLAMA_NEEDS | {"add_qkv_bias": True},
        fields=_llama_fields(present=True),
        fixed=(_SILU,),
        rope=Rope(),
        variants=(names.llama_attention() | names.llama_mlp(),),
        output="lm_head.weight",
        window=4096,
        ignored=_LLAMA_IGNORED,
    ),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        needs=_LLAMA_NEEDS | {"qk_layernorm": True},
        fields=_llama_fields(present=True, head_dim_present=True),
        fixed=(_SILU, _NO_ATTENTION_BIAS),
        rope=Rope(),
        variants=(names.llama_attention() | names.llama_mlp(),),
        output="lm_head.weight",
        window=4096,
        ignored=_LLAMA_IGNORED,
    ),
    Architecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        needs={name: value for name, value in _LLAMA_NEEDS.items() if name != "num_moe_experts"}
        | {"moe_shared_expert_intermediate_size": None},
        fields=(
            *_llama_fields(present=True, epsilon=1e-5),
            Field("num_local_experts", "num_moe_experts", whole),
            Field("num_experts_per_tok", "moe_router_topk", whole),
            Field("router_aux_loss_coef", "moe_aux_loss_coeff", number, 0.001),
        ),
        fixed=(_SILU, Fixed("router_jitter_noise", 0.0, 0.0, "the router is trained without noise")),
        rope=Rope(default_base=1e6),
        variants=(
            names.llama_attention() | names.mixtral_experts(),
            names.llama_attention() | names.mixtral_stacked(),
        ),
        output="lm_head.weight",
        misfit=lambda shape: None if shape.num_moe_experts else "a dense MLP",
        ignored=_LLAMA_IGNORED,
    ),
    Architecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        needs=_GPT_NEEDS | {"position_embedding_type": "learned_absolute"},
        fields=(
            *_sizes("n_embd", "n_layer", "n_head", "n_positions"),
            Field("n_inner", "mlp_width", whole, lambda known: 4 * known["hidden_size"]),
            Field("activation_function", "openai_gelu", gelu, "gelu_new"),
            Field("layer_norm_epsilon", "layernorm_epsilon", number, 1e-5),
            Field("attn_pdrop", "attention_dropout", number, 0.1),
            Field("resid_pdrop", "hidden_dropout", number, 0.1),
            Field("embd_pdrop", "hidden_dropout", number, 0.1),
            Field("tie_word_embeddings", "tied", flag, True),
        ),
        fixed=(
            Fixed("scale_attn_weights", True, True, "scores are divided by the root of head_dim"),
            Fixed("scale_attn_by_inverse_layer_idx", False, False, "scores are scaled alike in all layers"),
            Fixed("add_cross_attention", False, False, "there is no encoder"),
        ),
        rope=None,
        variants=(names.gpt2("transformer."), names.gpt2("")),
        output="lm_head.weight",
        misfit=_one_head_size,
        ignored=(r"\.attn\.(masked_)?bias$",),
    ),
    Architecture(
        model_type="gpt_neox",
        class_name="GPTNeoXForCausalLM",
        needs=_GPT_NEEDS | {"position_embedding_type": "rope"},
        fields=(
            *_SIZES,
            Field("intermediate_size", "mlp_width", whole),
            Field("hidden_act", "openai_gelu", gelu, "gelu"),
            Field("layer_norm_eps", "layernorm_epsilon", number, 1e-5),
            Field("attention_dropout", "attention_dropout", number, 0.0),
            Field("hidden_dropout", "hidden_dropout", number, 0.0),
            Field("tie_word_embeddings", "tied", flag, False),
        ),
        fixed=(
            Fixed("use_parallel_residual", False, True, "Megatron-Core adds attention before the MLP reads"),
            Fixed("attention_bias", True, True, "biases come with those of the MLP"),
        ),
        rope=Rope("rotary_emb_base", "rotary_pct", default_percent=0.25),
        variants=(names.gpt_neox(),),
        output="embed_out.weight",
        misfit=_one_head_size,
        ignored=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
    ),
)
