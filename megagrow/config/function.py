"""Which fields of a shape decide the function that a model computes, and which of them growth may change.

One table classifies every field of `ModelShape`. It is used wherever two shapes meet: a source and the stage that it
becomes, a checkpoint and the stage that trains it, a parent and its child. A field that decides the function must be
equal. An axis may grow, in a growth step only, and never shrink. A training setting may differ. Pure: no files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from megagrow.config.shape import ModelShape


class Part(Enum):
    """What a field of a shape is to the function that a model computes."""

    FUNCTION = "decides the function; no operator can change it"
    AXIS = "size of an axis: growth may increase it"
    TRAINING = "used in training only: the same weights compute the same function"


@dataclass(frozen=True)
class _Field:
    """A row of the table.

    Attributes:
        part: what the field is.
        value: what is compared: the field's value with defaults filled in; None in models that do not use the field.
    """

    part: Part
    value: Callable[[ModelShape], Any]


@dataclass(frozen=True)
class Difference:
    """A field in which two shapes differ, and its two values."""

    field: str
    source: Any
    target: Any

    def __str__(self) -> str:
        return f"{self.field} changes from {self.source} to {self.target}"


def _plain(part: Part, *names: str) -> dict[str, _Field]:
    """Rows of fields that every model uses as they are."""
    return {name: _Field(part, attrgetter(name)) for name in names}


def _if_rope(name: str) -> Callable[[ModelShape], Any]:
    return lambda shape: getattr(shape, name) if shape.position_embedding_type == "rope" else None


def _if_mixture(name: str) -> Callable[[ModelShape], Any]:
    return lambda shape: None if shape.num_moe_experts is None else getattr(shape, name)


def _scaling(shape: ModelShape) -> float | None:
    """The factor of Llama 3.1's scaling; dividing by 1 is no scaling."""
    return None if shape.rope_scaling_factor == 1.0 else shape.rope_scaling_factor


FIELDS: dict[str, _Field] = {
    **_plain(
        Part.FUNCTION, "normalization", "layernorm_epsilon", "position_embedding_type", "swiglu", "openai_gelu",
        "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights", "qk_layernorm",
    ),
    "kv_channels": _Field(Part.FUNCTION, lambda shape: shape.head_dim),
    "rotary_base": _Field(Part.FUNCTION, _if_rope("rotary_base")),
    "rotary_percent": _Field(Part.FUNCTION, _if_rope("rotary_percent")),
    "rope_scaling_factor": _Field(Part.FUNCTION, _scaling),
    # learned positions are a tensor, whose rows no operator adds; rotary ones have no end
    "max_position_embeddings": _Field(
        Part.FUNCTION, lambda shape: None if shape.position_embedding_type == "rope" else shape.positions
    ),
    **_plain(Part.AXIS, "num_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_moe_experts"),
    "num_query_groups": _Field(Part.AXIS, lambda shape: shape.groups),
    "make_vocab_size_divisible_by": _Field(Part.AXIS, lambda shape: shape.padded_vocab_size),
    "ffn_hidden_size": _Field(Part.AXIS, lambda shape: None if shape.num_moe_experts else shape.mlp_width),
    "moe_ffn_hidden_size": _Field(Part.AXIS, _if_mixture("mlp_width")),
    "moe_router_topk": _Field(Part.AXIS, _if_mixture("moe_router_topk")),
    "moe_shared_expert_intermediate_size": _Field(
        Part.AXIS, lambda shape: shape.moe_shared_expert_intermediate_size or 0
    ),
    **_plain(
        Part.TRAINING, "seq_length", "attention_dropout", "hidden_dropout", "init_method_std", "moe_aux_loss_coeff",
        "nominal_parameters",
    ),
}  # fmt: skip
"""Every field of `ModelShape`, in the order in which differences are reported."""
_PADDED, _PADDED_SIZE = "make_vocab_size_divisible_by", "padded_vocab_size"


def differences(one: ModelShape, other: ModelShape, *parts: Part) -> list[Difference]:
    """Return the fields in which two shapes differ, of the given parts. The size of a vocabulary is its padded one."""
    found = []
    for name, field in FIELDS.items():
        before, after = field.value(one), field.value(other)
        if field.part not in parts or before == after or name == "vocab_size":
            continue
        found.append(Difference(_PADDED_SIZE if name == _PADDED else name, before, after))
    return found


def filled(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of a shape as they are compared: defaults filled in, None for what the model does not use."""
    values = {_PADDED_SIZE if name == _PADDED else name: field.value(shape) for name, field in FIELDS.items()}
    return {**values, "vocab_size": shape.vocab_size}


def check_same_model(one: ModelShape, other: ModelShape, names: tuple[str, str]) -> None:
    """Raise ValueError unless two shapes have the same tensors and compute the same function.

    Args:
        one, other: the two shapes; what only training uses may differ.
        names: of the two in the error, such as ("the checkpoint", "the stage").
    """
    if found := differences(one, other, Part.FUNCTION, Part.AXIS):
        raise ValueError(
            ", ".join(f"{each.field} is {each.source} in {names[0]} and {each.target} in {names[1]}" for each in found)
        )


def check_growth(step: str, small: ModelShape, large: ModelShape, granularity: int) -> None:
    """Raise ValueError, with every difference and both values, if no operator can grow one shape into another.

    Args:
        step: name of the growth step in errors.
        small, large: the source and target shapes.
        granularity: number of slices that `upcycle` cuts a dense MLP into.
    """
    faults = []
    if fixed := differences(small, large, Part.FUNCTION):
        faults.append(f"{_listed(fixed)}, which no operator can do; the target must have {_to_keep(fixed)}")
    upcycled = small.num_moe_experts is None and large.num_moe_experts is not None
    slices = granularity if upcycled else 1
    if small.num_moe_experts is not None and large.num_moe_experts is None:
        faults.append(f"num_moe_experts {small.num_moe_experts} cannot become a dense MLP; keep num_moe_experts")
    if small.ffn_hidden_size % slices:
        faults.append(f"growth.granularity {slices} does not divide ffn_hidden_size {small.ffn_hidden_size}")
    elif shrunk := _shrinking(small, large, slices):
        narrow = upcycled and any(each.field == "moe_ffn_hidden_size" for each in shrunk)
        hint = f" (or set growth.granularity, {slices} now)" if narrow else ""
        sizes = ", ".join(f"{each.field} shrinks from {each.source} to {each.target}" for each in shrunk)
        faults.append(f"{sizes}; a target must not be smaller{hint}")
    if faults:
        raise ValueError(f"{step}: {'; '.join(faults)}")


def _listed(found: list[Difference]) -> str:
    why = " (rotary frequencies and softmax scale would differ)"
    return ", ".join(f"{each}{why if each.field == 'kv_channels' else ''}" for each in found)


def _to_keep(found: list[Difference]) -> str:
    """The settings of a target that would keep the source's function, as YAML."""
    kept = {each.field: each.source for each in found if each.source is not None or each.field == "rope_scaling_factor"}
    yaml = {True: "true", False: "false", None: "null"}
    return ", ".join(
        f"{name}: {yaml[value] if value is None or isinstance(value, bool) else value}" for name, value in kept.items()
    )


def _shrinking(small: ModelShape, large: ModelShape, slices: int) -> list[Difference]:
    """Return the axes that would shrink; an upcycled MLP is cut into `slices` first."""
    grown = [
        each for each in differences(small, large, Part.AXIS) if each.source is not None and each.target is not None
    ]
    if small.num_moe_experts is None and large.num_moe_experts is not None:
        grown.append(Difference("moe_ffn_hidden_size", small.mlp_width // slices, large.mlp_width))
    # Where a source does not tell its tokens from its padding, its vocabulary is all rows: fewer tokens are no loss.
    if small.vocab_size != small.padded_vocab_size:
        grown.append(Difference("vocab_size", small.vocab_size, large.vocab_size))
    return [each for each in grown if each.target < each.source]
