"""The table of canonical tensors: Megatron's keys, their dimensions, and everything that depends on a tensor's kind.

To support another tensor, add a row. Keys are those of Megatron-Core's distributed checkpoints, in which the layers
of one kind are stacked: `decoder.layers.X` has global shape [num_layers, ...], and a row lists the dimensions after
the layer. The optimizer has the same keys again, once for each of its states.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megagrow.checkpoint.tensors.dimensions import (
    EXPERT_READ,
    EXPERT_WRITE,
    FFN_READ,
    FFN_WRITE,
    FINAL_GAIN,
    FINAL_OFFSET,
    GLU_ROWS,
    HEAD_COLUMNS,
    HEAD_DIM,
    HIDDEN_GAIN,
    HIDDEN_OFFSET,
    HIDDEN_READ,
    HIDDEN_WRITE,
    POSITIONS,
    QKV_ROWS,
    ROUTER_ROWS,
    SHARED_GLU_ROWS,
    SHARED_READ,
    SHARED_WRITE,
    VOCAB_READ,
    VOCAB_WRITE,
    Dim,
)
from megagrow.config import ModelShape

Initial = Literal["normal", "output", "zeros", "ones"]
Condition = Callable[[ModelShape], bool]
LAYERS = "decoder.layers."
OPTIMIZER_STATES = ("param", "exp_avg", "exp_avg_sq")
_ATTENTION = LAYERS + "self_attention."
_MLP = LAYERS + "mlp."
_MIXTURE_NORM = LAYERS + "pre_mlp_layernorm."
_EXPERTS = _MLP + "experts.experts."
_SHARED = _MLP + "shared_experts."
_BLOCKS = {
    VOCAB_WRITE: 1, VOCAB_READ: 1, QKV_ROWS: 1, HEAD_COLUMNS: 1, FFN_WRITE: 1, FFN_READ: 1, SHARED_WRITE: 1,
    SHARED_READ: 1, GLU_ROWS: 2, SHARED_GLU_ROWS: 2,
}  # fmt: skip
"""The dimensions that tensor parallelism cuts, each with the blocks (gate and up) that are cut alike."""


@dataclass(frozen=True)
class TensorKind:
    """A row of the table.

    Attributes:
        key: the tensor's key in the checkpoint, without an optimizer prefix.
        dims: the dimensions of one layer's tensor.
        initial: fresh values: `normal` with init_method_std, `output` with that over sqrt(2 L), `zeros` or `ones`.
        residual_writer: whether it adds to the residual stream, so that zeroing it silences its part of a layer.
        tensor_parallel: (dimension, blocks) that tensor parallelism cuts; each block is cut alike.
        exists: whether a model of a given shape has it.
        dense: key of the tensor that a dense model has instead; a mixture's experts are slices of that one.
    """

    key: str
    dims: tuple[Dim, ...]
    initial: Initial = "normal"
    residual_writer: bool = False
    tensor_parallel: tuple[int, int] | None = None
    exists: Condition = lambda shape: True
    dense: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether its first dimension is the experts, which expert parallelism cuts."""
        return self.dims[0] in (EXPERT_WRITE, EXPERT_READ)

    @property
    def per_layer(self) -> bool:
        """Whether layers are stacked in front of its"""
        return self.key.startswith(LAYERS)

    def layer_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape of one layer's tensor (of the whole tensor where it has no layers)."""
        return tuple(dim.size(shape) for dim in self.dims)

    def global_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return (shape.num_layers,) * self.per_layer + self.layer_shape(shape)

    def std(self, shape: ModelShape) -> float:
        """Standard deviation of fresh entries; 0 means that they are all `constant`."""
        if self.initial == "output":
            return shape.init_method_std / math.sqrt(2 * shape.num_layers)
        return shape.init_method_std if self.initial == "normal" else 0.0

    @property
    def constant(self) -> float:
        """Value of fresh entries that are not random."""
        return 1.0 if self.initial == "ones" else 0.0

    @property
    def silences(self) -> bool:
        """Whether `redundant` zeroes it in a new layer: the gains of the residual stream's norms, and all biases."""
        return self.dims[0] is HIDDEN_GAIN or self.initial == "zeros"

    @property
    def silences_gated(self) -> bool:
        """Like `silences`, for a model with a gated MLP: a zero gain would silence it forever, so linear_fc2 is zeroed.

        A mixture does the same, because a zero gain would also leave its router without a choice.
        """
        if self.key.startswith((_MLP, _MIXTURE_NORM)):
            return self.residual_writer
        return self.silences

    def address(self, layer: int | None) -> str:
        """Name of one layer's tensor, which seeds its random values."""
        return self.key if layer is None else f"{self.key}.{layer}"


def _weight(key: str, *dims: Dim, when: Sequence[Condition] = (), dense: str | None = None) -> TensorKind:
    """A row for a weight that is initialized with init_method_std."""
    return TensorKind(key, dims, "normal", False, _tensor_parallel(dims), _all_of(when), dense)


def _output(key: str, *dims: Dim, when: Sequence[Condition] = (), dense: str | None = None) -> TensorKind:
    """A row for a weight that writes to the residual stream."""
    return TensorKind(key, dims, "output", True, _tensor_parallel(dims), _all_of(when), dense)


def _gain(key: str, dim: Dim, *, when: Sequence[Condition] = (), dense: str | None = None) -> TensorKind:
    """A row for a norm's gain."""
    return TensorKind(key, (dim,), "ones", False, None, _all_of(when), dense)


def _bias(key: str, dim: Dim, *, when: Sequence[Condition] = (), dense: str | None = None) -> TensorKind:
    """A row for a bias; that of a norm has an `OFFSET` dimension, that of a residual writer `HIDDEN_WRITE`."""
    return TensorKind(key, (dim,), "zeros", dim is HIDDEN_WRITE, _tensor_parallel((dim,)), _all_of(when), dense)


def _tensor_parallel(dims: tuple[Dim, ...]) -> tuple[int, int] | None:
    return next(((number, _BLOCKS[dim]) for number, dim in enumerate(dims) if dim in _BLOCKS), None)


def _all_of(conditions: Sequence[Condition]) -> Condition:
    return lambda shape: all(condition(shape) for condition in conditions)


def _dense(shape: ModelShape) -> bool:
    return shape.num_moe_experts is None


def _mixture(shape: ModelShape) -> bool:
    return shape.num_moe_experts is not None


def _shared_expert(shape: ModelShape) -> bool:
    return shape.moe_shared_expert_intermediate_size is not None


def _gated(shape: ModelShape) -> bool:
    return shape.swiglu


def _not_gated(shape: ModelShape) -> bool:
    return not shape.swiglu


def _biases(shape: ModelShape) -> bool:
    return shape.add_bias_linear


def _qkv_bias(shape: ModelShape) -> bool:
    return shape.add_bias_linear or shape.add_qkv_bias


def _norm_biases(shape: ModelShape) -> bool:
    return shape.normalization == "LayerNorm"


def _qk_norms(shape: ModelShape) -> bool:
    return shape.qk_layernorm


def _learned_positions(shape: ModelShape) -> bool:
    return shape.position_embedding_type == "learned_absolute"


def _untied(shape: ModelShape) -> bool:
    return not shape.tied


# fmt: off
_TABLE: tuple[TensorKind, ...] = (
    _weight("embedding.word_embeddings.weight", VOCAB_WRITE, HIDDEN_WRITE),
    _weight("embedding.position_embeddings.weight", POSITIONS, HIDDEN_WRITE, when=[_learned_positions]),

    _gain(_ATTENTION + "linear_qkv.layer_norm_weight", HIDDEN_GAIN),
    _bias(_ATTENTION + "linear_qkv.layer_norm_bias", HIDDEN_OFFSET, when=[_norm_biases]),
    _weight(_ATTENTION + "linear_qkv.weight", QKV_ROWS, HIDDEN_READ),
    _bias(_ATTENTION + "linear_qkv.bias", QKV_ROWS, when=[_qkv_bias]),
    _gain(_ATTENTION + "q_layernorm.weight", HEAD_DIM, when=[_qk_norms]),
    _gain(_ATTENTION + "k_layernorm.weight", HEAD_DIM, when=[_qk_norms]),
    _bias(_ATTENTION + "q_layernorm.bias", HEAD_DIM, when=[_qk_norms, _norm_biases]),
    _bias(_ATTENTION + "k_layernorm.bias", HEAD_DIM, when=[_qk_norms, _norm_biases]),
    _output(_ATTENTION + "linear_proj.weight", HIDDEN_WRITE, HEAD_COLUMNS),
    _bias(_ATTENTION + "linear_proj.bias", HIDDEN_WRITE, when=[_biases]),

    _gain(_MLP + "linear_fc1.layer_norm_weight", HIDDEN_GAIN, when=[_dense]),
    _bias(_MLP + "linear_fc1.layer_norm_bias", HIDDEN_OFFSET, when=[_norm_biases, _dense]),
    _weight(_MLP + "linear_fc1.weight", GLU_ROWS, HIDDEN_READ, when=[_gated, _dense]),
    _weight(_MLP + "linear_fc1.weight", FFN_WRITE, HIDDEN_READ, when=[_not_gated, _dense]),
    _bias(_MLP + "linear_fc1.bias", GLU_ROWS, when=[_biases, _gated]),
    _bias(_MLP + "linear_fc1.bias", FFN_WRITE, when=[_biases, _not_gated]),
    _output(_MLP + "linear_fc2.weight", HIDDEN_WRITE, FFN_READ, when=[_dense]),
    _bias(_MLP + "linear_fc2.bias", HIDDEN_WRITE, when=[_biases]),

    _gain(_MIXTURE_NORM + "weight", HIDDEN_GAIN, when=[_mixture], dense=_MLP + "linear_fc1.layer_norm_weight"),
    _bias(_MIXTURE_NORM + "bias", HIDDEN_OFFSET, when=[_norm_biases, _mixture],
          dense=_MLP + "linear_fc1.layer_norm_bias"),
    _weight(_MLP + "router.weight", ROUTER_ROWS, HIDDEN_READ, when=[_mixture]),
    _weight(_EXPERTS + "linear_fc1.weight", EXPERT_WRITE, GLU_ROWS, HIDDEN_READ, when=[_gated, _mixture],
            dense=_MLP + "linear_fc1.weight"),
    _weight(_EXPERTS + "linear_fc1.weight", EXPERT_WRITE, FFN_WRITE, HIDDEN_READ, when=[_not_gated, _mixture],
            dense=_MLP + "linear_fc1.weight"),
    _output(_EXPERTS + "linear_fc2.weight", EXPERT_READ, HIDDEN_WRITE, FFN_READ, when=[_mixture],
            dense=_MLP + "linear_fc2.weight"),
    _weight(_SHARED + "linear_fc1.weight", SHARED_GLU_ROWS, HIDDEN_READ, when=[_gated, _shared_expert]),
    _weight(_SHARED + "linear_fc1.weight", SHARED_WRITE, HIDDEN_READ, when=[_not_gated, _shared_expert]),
    _output(_SHARED + "linear_fc2.weight", HIDDEN_WRITE, SHARED_READ, when=[_shared_expert]),

    _gain("decoder.final_layernorm.weight", FINAL_GAIN),
    _bias("decoder.final_layernorm.bias", FINAL_OFFSET, when=[_norm_biases]),
    _weight("output_layer.weight", VOCAB_READ, HIDDEN_READ, when=[_untied]),
)
# fmt: on


def tensor_kinds(shape: ModelShape) -> tuple[TensorKind, ...]:
    """Return the tensors of a model of a given shape, in the order of the table."""
    return tuple(kind for kind in _TABLE if kind.exists(shape))


def all_tensor_kinds() -> tuple[TensorKind, ...]:
    """Return every row of the table; some keys have two, of which a model has one."""
    return _TABLE


def source_kind(kind: TensorKind, small: ModelShape) -> TensorKind | None:
    """Return the tensor of a smaller model that `kind` grows from: the same, a dense model's instead, or None."""
    own = {other.key: other for other in tensor_kinds(small)}
    return own.get(kind.key) or own.get(kind.dense or "")


def optimizer_key(state: str, key: str) -> str:
    """Key of an optimizer state of a tensor."""
    return f"optimizer.state.{state}.{key}"


def extra_state_keys(shape: ModelShape) -> tuple[str, ...]:
    """Return the keys of the (empty) `_extra_state` objects that Megatron-Core expects for its linear layers."""
    layers, experts = shape.num_layers, shape.num_moe_experts or 0
    owners = [_ATTENTION + "linear_proj", _ATTENTION + "linear_qkv"]
    for prefix, exists in ((_MLP, _dense(shape)), (_SHARED, _shared_expert(shape))):
        owners += [prefix + "linear_fc1", prefix + "linear_fc2"] if exists else []
    keys = [f"{owner}._extra_state/shard_{layer}_{layers}" for owner in owners for layer in range(layers)]
    for owner in (_EXPERTS + "linear_fc1", _EXPERTS + "linear_fc2"):
        places = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        keys += [f"{owner}._extra_state/shard_{layer}.{expert}_{layers}.{experts}" for layer, expert in places]
    return tuple(keys)
