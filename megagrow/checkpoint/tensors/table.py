"""The table of canonical tensors: Megatron's keys, their dimensions, and all that a tensor's kind decides.

A tensor that the package should know is one more row. Keys are those of Megatron-Core's distributed checkpoints,
in which the layers of one kind are stacked: `decoder.layers.X` has global shape [num_layers, ...] and dims name
what comes after the layer. The optimizer holds the same keys again, once for each of its states.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megagrow.checkpoint.tensors import dimensions
from megagrow.checkpoint.tensors.dimensions import Dim
from megagrow.config import ModelShape

Initial = Literal["normal", "output", "zeros", "ones"]
LAYERS = "decoder.layers."
OPTIMIZER_STATES = ("param", "exp_avg", "exp_avg_sq")
EXTRA_STATE_OWNERS = ("self_attention.linear_proj", "self_attention.linear_qkv")
_OF_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
_OF_SHARED = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_OF_EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class TensorKind:
    """A row of the table.

    Attributes:
        key: in the checkpoint, without an optimizer prefix.
        dims: of one layer's tensor.
        initial: fresh values: normal with init_method_std, `output` with that over sqrt(2 L), zeros or ones.
        residual_writer: whether it adds to the residual stream, so that zeroing it silences its layer's part.
        tensor_parallel: (dimension, blocks) that tensor parallelism cuts: each of the blocks is cut alike.
        exists: whether a shape has it.
        dense: key of the tensor that a dense model has in its place; a mixture's experts are slices of it.
    """

    key: str
    dims: tuple[Dim, ...]
    initial: Initial = "normal"
    residual_writer: bool = False
    tensor_parallel: tuple[int, int] | None = None
    exists: Callable[[ModelShape], bool] = lambda shape: True
    dense: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether experts are its first dimension, and expert parallelism cuts there."""
        return self.dims[0] in (dimensions.EXPERT_WRITE, dimensions.EXPERT_READ)

    @property
    def per_layer(self) -> bool:
        """Whether layers are stacked in front of its dimensions."""
        return self.key.startswith(LAYERS)

    def layer_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape of the tensor of one layer (of the whole tensor where there are no layers)."""
        return tuple(dim.size(shape) for dim in self.dims)

    def global_shape(self, shape: ModelShape) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        return (shape.num_layers,) * self.per_layer + self.layer_shape(shape)

    def std(self, shape: ModelShape) -> float:
        """Standard deviation of fresh entries; 0: they are `constant`."""
        if self.initial == "output":
            return shape.init_method_std / math.sqrt(2 * shape.num_layers)
        return shape.init_method_std if self.initial == "normal" else 0.0

    @property
    def constant(self) -> float:
        """Value of fresh entries that are not random."""
        return 1.0 if self.initial == "ones" else 0.0

    @property
    def silences(self) -> bool:
        """Whether `redundant` zeroes it in a new layer: gains of the residual stream's norms, and all biases."""
        return self.dims[0] is dimensions.HIDDEN_GAIN or self.initial == "zeros"

    @property
    def silences_gated(self) -> bool:
        """The same with a gated MLP, which a zero gain would silence for ever: there linear_fc2 is zeroed instead.

        So it is in a mixture, where a zero gain would also leave the router without a choice.
        """
        if self.key.startswith((_MLP, _MIXTURE_NORM)):
            return self.residual_writer
        return self.silences

    def address(self, layer: int | None) -> str:
        """Name of one layer's tensor, from which its random parts follow."""
        return self.key if layer is None else f"{self.key}.{layer}"


def _norm_biases(shape: ModelShape) -> bool:
    return shape.normalization == "LayerNorm"


_F = dimensions
_ATTENTION = LAYERS + "self_attention."
_MLP = LAYERS + "mlp."
_MIXTURE_NORM = LAYERS + "pre_mlp_layernorm."
_EXPERTS = _MLP + "experts.experts."
_SHARED = _MLP + "shared_experts."


def _dense(shape: ModelShape) -> bool:
    return shape.num_moe_experts is None


def _mixture(shape: ModelShape) -> bool:
    return shape.num_moe_experts is not None


def _has_shared(shape: ModelShape) -> bool:
    return shape.moe_shared_expert_intermediate_size is not None


_TABLE: tuple[TensorKind, ...] = (
    TensorKind("embedding.word_embeddings.weight", (_F.VOCAB_WRITE, _F.HIDDEN_WRITE), tensor_parallel=(0, 1)),
    TensorKind(
        "embedding.position_embeddings.weight",
        (_F.POSITIONS, _F.HIDDEN_WRITE),
        exists=lambda shape: shape.position_embedding_type == "learned_absolute",
    ),
    TensorKind(_ATTENTION + "linear_qkv.layer_norm_weight", (_F.HIDDEN_GAIN,), "ones"),
    TensorKind(_ATTENTION + "linear_qkv.layer_norm_bias", (_F.HIDDEN_OFFSET,), "zeros", exists=_norm_biases),
    TensorKind(_ATTENTION + "linear_qkv.weight", (_F.QKV_ROWS, _F.HIDDEN_READ), tensor_parallel=(0, 1)),
    TensorKind(
        _ATTENTION + "linear_qkv.bias",
        (_F.QKV_ROWS,),
        "zeros",
        tensor_parallel=(0, 1),
        exists=lambda shape: shape.add_bias_linear or shape.add_qkv_bias,
    ),
    TensorKind(_ATTENTION + "q_layernorm.weight", (_F.HEAD_DIM,), "ones", exists=lambda shape: shape.qk_layernorm),
    TensorKind(_ATTENTION + "k_layernorm.weight", (_F.HEAD_DIM,), "ones", exists=lambda shape: shape.qk_layernorm),
    TensorKind(
        _ATTENTION + "q_layernorm.bias",
        (_F.HEAD_DIM,),
        "zeros",
        exists=lambda shape: shape.qk_layernorm and _norm_biases(shape),
    ),
    TensorKind(
        _ATTENTION + "k_layernorm.bias",
        (_F.HEAD_DIM,),
        "zeros",
        exists=lambda shape: shape.qk_layernorm and _norm_biases(shape),
    ),
    TensorKind(
        _ATTENTION + "linear_proj.weight",
        (_F.HIDDEN_WRITE, _F.HEAD_COLUMNS),
        "output",
        residual_writer=True,
        tensor_parallel=(1, 1),
    ),
    TensorKind(
        _ATTENTION + "linear_proj.bias",
        (_F.HIDDEN_WRITE,),
        "zeros",
        residual_writer=True,
        exists=lambda shape: shape.add_bias_linear,
    ),
    TensorKind(_MLP + "linear_fc1.layer_norm_weight", (_F.HIDDEN_GAIN,), "ones", exists=_dense),
    TensorKind(
        _MLP + "linear_fc1.layer_norm_bias",
        (_F.HIDDEN_OFFSET,),
        "zeros",
        exists=lambda shape: _norm_biases(shape) and _dense(shape),
    ),
    TensorKind(
        _MLP + "linear_fc1.weight",
        (_F.GLU_ROWS, _F.HIDDEN_READ),
        tensor_parallel=(0, 2),
        exists=lambda shape: shape.swiglu and _dense(shape),
    ),
    TensorKind(
        _MLP + "linear_fc1.weight",
        (_F.FFN_WRITE, _F.HIDDEN_READ),
        tensor_parallel=(0, 1),
        exists=lambda shape: not shape.swiglu and _dense(shape),
    ),
    TensorKind(
        _MLP + "linear_fc1.bias",
        (_F.GLU_ROWS,),
        "zeros",
        tensor_parallel=(0, 2),
        exists=lambda shape: shape.add_bias_linear and shape.swiglu,
    ),
    TensorKind(
        _MLP + "linear_fc1.bias",
        (_F.FFN_WRITE,),
        "zeros",
        tensor_parallel=(0, 1),
        exists=lambda shape: shape.add_bias_linear and not shape.swiglu,
    ),
    TensorKind(
        _MLP + "linear_fc2.weight",
        (_F.HIDDEN_WRITE, _F.FFN_READ),
        "output",
        residual_writer=True,
        tensor_parallel=(1, 1),
        exists=_dense,
    ),
    TensorKind(
        _MLP + "linear_fc2.bias",
        (_F.HIDDEN_WRITE,),
        "zeros",
        residual_writer=True,
        exists=lambda shape: shape.add_bias_linear,
    ),
    TensorKind(
        _MIXTURE_NORM + "weight",
        (_F.HIDDEN_GAIN,),
        "ones",
        exists=_mixture,
        dense=_MLP + "linear_fc1.layer_norm_weight",
    ),
    TensorKind(
        _MIXTURE_NORM + "bias",
        (_F.HIDDEN_OFFSET,),
        "zeros",
        exists=lambda shape: _norm_biases(shape) and _mixture(shape),
        dense=_MLP + "linear_fc1.layer_norm_bias",
    ),
    TensorKind(_MLP + "router.weight", (_F.ROUTER_ROWS, _F.HIDDEN_READ), exists=_mixture),
    TensorKind(
        _EXPERTS + "linear_fc1.weight",
        (_F.EXPERT_WRITE, _F.GLU_ROWS, _F.HIDDEN_READ),
        tensor_parallel=(1, 2),
        exists=lambda shape: shape.swiglu and _mixture(shape),
        dense=_MLP + "linear_fc1.weight",
    ),
    TensorKind(
        _EXPERTS + "linear_fc1.weight",
        (_F.EXPERT_WRITE, _F.FFN_WRITE, _F.HIDDEN_READ),
        tensor_parallel=(1, 1),
        exists=lambda shape: not shape.swiglu and _mixture(shape),
        dense=_MLP + "linear_fc1.weight",
    ),
    TensorKind(
        _EXPERTS + "linear_fc2.weight",
        (_F.EXPERT_READ, _F.HIDDEN_WRITE, _F.FFN_READ),
        "output",
        residual_writer=True,
        tensor_parallel=(2, 1),
        exists=_mixture,
        dense=_MLP + "linear_fc2.weight",
    ),
    TensorKind(
        _SHARED + "linear_fc1.weight",
        (_F.SHARED_GLU_ROWS, _F.HIDDEN_READ),
        tensor_parallel=(0, 2),
        exists=lambda shape: shape.swiglu and _has_shared(shape),
    ),
    TensorKind(
        _SHARED + "linear_fc1.weight",
        (_F.SHARED_WRITE, _F.HIDDEN_READ),
        tensor_parallel=(0, 1),
        exists=lambda shape: not shape.swiglu and _has_shared(shape),
    ),
    TensorKind(
        _SHARED + "linear_fc2.weight",
        (_F.HIDDEN_WRITE, _F.SHARED_READ),
        "output",
        residual_writer=True,
        tensor_parallel=(1, 1),
        exists=_has_shared,
    ),
    TensorKind("decoder.final_layernorm.weight", (_F.FINAL_GAIN,), "ones"),
    TensorKind("decoder.final_layernorm.bias", (_F.FINAL_OFFSET,), "zeros", exists=_norm_biases),
    TensorKind(
        "output_layer.weight",
        (_F.VOCAB_READ, _F.HIDDEN_READ),
        tensor_parallel=(0, 1),
        exists=lambda shape: not shape.tied,
    ),
)


def kinds(shape: ModelShape) -> tuple[TensorKind, ...]:
    """The tensors of a model of a shape, in the order of the table."""
    return tuple(kind for kind in _TABLE if kind.exists(shape))


def source_kind(kind: TensorKind, small: ModelShape) -> TensorKind | None:
    """The tensor of a smaller model that `kind` grows from: its own, a dense model's in its place, or none."""
    own = {other.key: other for other in kinds(small)}
    return own.get(kind.key) or own.get(kind.dense or "")


def optimizer_key(state: str, key: str) -> str:
    """Key of an optimizer state of a tensor."""
    return f"optimizer.state.{state}.{key}"


def extra_state_keys(shape: ModelShape) -> tuple[str, ...]:
    """Keys of the (empty) `_extra_state` objects that Megatron-Core expects of its linear layers."""
    layers, experts = shape.num_layers, shape.num_moe_experts or 0
    stacked = (*EXTRA_STATE_OWNERS, *(_OF_DENSE if _dense(shape) else ()), *(_OF_SHARED if _has_shared(shape) else ()))
    keys = [f"{owner}._extra_state/shard_{layer}_{layers}" for owner in stacked for layer in range(layers)]
    for owner in _OF_EXPERTS:
        places = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        keys += [f"{owner}._extra_state/shard_{layer}.{expert}_{layers}.{experts}" for layer, expert in places]
    return tuple(LAYERS + key for key in keys)
