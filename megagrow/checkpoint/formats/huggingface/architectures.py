"""The table of Hugging Face architectures: for each the shapes it can express, its config.json and its tensors.

Another architecture is one more row, if Megatron-Core has the model. `needs` are the properties of a shape that the
architecture implies, `fields` are the fields of config.json that hold the other properties, and `fixed` are fields
that must have one value. Nothing outside this table depends on an architecture's name.
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
"""Default of a field that has none and must be present."""
_EXACT_GELU = ("gelu", "gelu_python")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate")


def positive_integer(value: Any) -> int:
    """Return a positive integer."""
    if type(value) is not int or value <= 0:
        raise ValueError("must be a whole number above 0")
    return value


def finite_number(value: Any) -> float:
    """Return a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("must be a number")
    return float(value)


def boolean(value: Any) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        raise ValueError("must be true or false")
    return value


def gelu(value: Any) -> bool:
    """Return whether a name of GELU means the tanh approximation (`openai_gelu`)."""
    if value not in (*_EXACT_GELU, *_TANH_GELU):
        raise ValueError(f"only GELU is supported: {', '.join((*_EXACT_GELU, *_TANH_GELU))}")
    return value in _TANH_GELU


@dataclass(frozen=True)
class Field:
    """A field of config.json that holds an attribute of a shape.

    Attributes:
        name: in config.json.
        attribute: of `ModelShape`.
        parse: converts the JSON value to the attribute; its ValueError names the accepted values.
        default: value if the field is null, or absent unless `present`; may be a function of the attributes so far.
        present: whether the field is required, because its default when absent differs between transformers' classes.
    """

    name: str
    attribute: str
    parse: Callable[[Any], Any]
    default: Any = REQUIRED
    present: bool = False

    def write(self, value: Any) -> Any:
        """Return the JSON value of an attribute."""
        return ("gelu_new" if value else "gelu") if self.parse is gelu else value


@dataclass(frozen=True)
class Fixed:
    """A field of config.json that must have one value, because any other means a function that is not supported.

    Attributes:
        name: in config.json.
        value: the only supported one, and the one that is written.
        default: value if the field is absent.
        why: the reason, for errors.
    """

    name: str
    value: Any
    default: Any
    why: str


@dataclass(frozen=True)
class Rope:
    """Names and defaults of an architecture's fields for rotary positions, as they were before transformers 5."""

    base: str = "rope_theta"
    percent: str = "partial_rotary_factor"
    default_base: float = 10000.0
    default_percent: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        model_type, class_name: names of the architecture in config.json.
        needs: values that it implies for attributes of a shape.
        fields, fixed: of config.json.
        rope: fields of config.json for rotary positions; None if positions are learned.
        variants: its tensors by canonical key, one table for each set of names in use; the first one is written.
        output: name of the output layer's tensor.
        window: default of `sliding_window`; None if there is no such field, or no window by default.
        has_window_switch: whether the window applies only if `use_sliding_window` is true, and then only to the
            layers that `layer_types` or `max_window_layers` selects.
        misfit: returns any other reason why a shape cannot be expressed, or None.
        ignored: patterns of buffers in old versions that hold no weights.
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
    has_window_switch: bool = False
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
        Field("vocab_size", "vocab_size", positive_integer),
        Field(hidden, "hidden_size", positive_integer),
        Field(layers, "num_layers", positive_integer),
        Field(heads, "num_attention_heads", positive_integer),
        Field(positions, "positions", positive_integer),
        Field("initializer_range", "init_method_std", finite_number, 0.02),
    )


_SIZES = _sizes("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def _llama_fields(*, present: bool, epsilon: float = 1e-6, head_dim_present: bool = False) -> tuple[Field, ...]:
    return (
        *_SIZES,
        Field("intermediate_size", "mlp_width", positive_integer),
        Field(
            "num_key_value_heads", "groups", positive_integer,
            lambda attributes: attributes["num_attention_heads"], present,
        ),
        Field(
            "head_dim", "head_dim", positive_integer,
            lambda attributes: attributes["hidden_size"] // attributes["num_attention_heads"], head_dim_present,
        ),
        Field("rms_norm_eps", "layernorm_epsilon", finite_number, epsilon),
        Field("attention_dropout", "attention_dropout", finite_number, 0.0),
        Field("tie_word_embeddings", "tied", boolean, False),
    )  # fmt: skip


_SILU = Fixed("hidden_act", "silu", "silu", "the gated MLP uses SiLU")
_NO_ATTENTION_BIAS = Fixed(
    "attention_bias", False, False, "biases of queries, keys and values come with one of the output projection"
)
_LLAMA_IGNORED = (r"\.rotary_emb\.inv_freq$",)


def _one_head_size(shape: ModelShape) -> str | None:
    if shape.groups != shape.num_attention_heads:
        return f"num_query_groups {shape.groups}: it has keys and values for every head"
    if shape.num_attention_heads * shape.head_dim != shape.hidden_size:
        return f"head_dim {shape.head_dim}: it requires hidden_size / num_attention_heads"
    return None


def _divides(shape: ModelShape) -> str | None:
    if shape.hidden_size % shape.num_attention_heads:
        return f"num_attention_heads {shape.num_attention_heads}: it does not divide hidden_size {shape.hidden_size}"
    return None


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        needs={name: value for name, value in _LLAMA_NEEDS.items() if name != "add_bias_linear"},
        fields=(
            *_llama_fields(present=False),
            Field("attention_bias", "add_bias_linear", boolean, False),
            Field("mlp_bias", "add_bias_linear", boolean, False),
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
        has_window_switch=True,
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
        has_window_switch=True,
        ignored=_LLAMA_IGNORED,
    ),
    Architecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        needs={name: value for name, value in _LLAMA_NEEDS.items() if name != "num_moe_experts"}
        | {"moe_shared_expert_intermediate_size": None},
        fields=(
            *_llama_fields(present=True, epsilon=1e-5),
            Field("num_local_experts", "num_moe_experts", positive_integer),
            Field("num_experts_per_tok", "moe_router_topk", positive_integer),
            Field("router_aux_loss_coef", "moe_aux_loss_coeff", finite_number, 0.001),
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
            Field("n_inner", "mlp_width", positive_integer, lambda attributes: 4 * attributes["hidden_size"]),
            Field("activation_function", "openai_gelu", gelu, "gelu_new"),
            Field("layer_norm_epsilon", "layernorm_epsilon", finite_number, 1e-5),
            Field("attn_pdrop", "attention_dropout", finite_number, 0.1),
            Field("resid_pdrop", "hidden_dropout", finite_number, 0.1),
            Field("embd_pdrop", "hidden_dropout", finite_number, 0.1),
            Field("tie_word_embeddings", "tied", boolean, True),
        ),
        fixed=(
            Fixed("scale_attn_weights", True, True, "attention scores are divided by the square root of head_dim"),
            Fixed(
                "scale_attn_by_inverse_layer_idx", False, False, "attention scores have the same scale in all layers"
            ),
            Fixed("add_cross_attention", False, False, "the model has no encoder"),
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
            Field("intermediate_size", "mlp_width", positive_integer),
            Field("hidden_act", "openai_gelu", gelu, "gelu"),
            Field("layer_norm_eps", "layernorm_epsilon", finite_number, 1e-5),
            Field("attention_dropout", "attention_dropout", finite_number, 0.0),
            Field("hidden_dropout", "hidden_dropout", finite_number, 0.0),
            Field("tie_word_embeddings", "tied", boolean, False),
        ),
        fixed=(
            Fixed("use_parallel_residual", False, True, "Megatron-Core adds the attention output before the MLP"),
            Fixed("attention_bias", True, True, "biases in attention come with those in the MLP"),
        ),
        rope=Rope("rotary_emb_base", "rotary_pct", default_percent=0.25),
        variants=(names.gpt_neox(),),
        output="embed_out.weight",
        misfit=_one_head_size,
        ignored=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
    ),
)
