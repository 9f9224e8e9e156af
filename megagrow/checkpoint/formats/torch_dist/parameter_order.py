"""The parameters of each rank of Megatron-Core in the order of its modules, and the part of a tensor that each is.

A flat buffer does not record its content: it contains the parameters of one rank's model chunk in the order of
`GPTModel.named_parameters()`. That order is a table here, one row per parameter of a layer. It varies in two ways:
Transformer Engine's layers hold a norm inside the linear layer that follows it, and experts are ordered one by one,
weight by weight, or (in the old GroupedMLP) as one transposed parameter. This module lists the parameters of any such
order; which order was written is decided by `flat_packing`.

Sources: Megatron-Core 0.16.1, `models/gpt/gpt_model.py`, `transformer/{transformer_layer,attention}.py`,
`transformer/moe/{moe_layer,experts}.py`; Transformer Engine 2, `pytorch/module/layernorm_linear.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from megagrow.checkpoint.index import Box
from megagrow.checkpoint.tensors import LAYERS, TensorKind, tensor_kinds
from megagrow.config import ModelShape

_EXPERTS = "mlp.experts"
"""Row of the table where a layer's experts are inserted, in an `ExpertOrder`."""
_QKV_NORM = ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias")
_PROJ = ("self_attention.linear_proj.weight", "self_attention.linear_proj.bias")
_REMAINING = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm.weight",
    "self_attention.q_layernorm.bias",
    "self_attention.k_layernorm.weight",
    "self_attention.k_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_bias",
    "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.bias",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
    "mlp.router.weight",
    _EXPERTS,
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
)
_EXPERT_WEIGHTS = tuple(f"{LAYERS}mlp.experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))
_BEFORE = ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight")
_AFTER = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias")
_OUTPUT = "output_layer.weight"


class LayerOrder(Enum):
    """Order of a layer's parameters, with separate (LOCAL) or fused (Transformer Engine) norms."""

    LOCAL = (*_QKV_NORM, *_PROJ, *_REMAINING)
    FUSED = (*_PROJ, *_QKV_NORM, *_REMAINING)


class ExpertOrder(Enum):
    """Order of a rank's experts in SequentialMLP, TEGroupedMLP and GroupedMLP."""

    ONE_BY_ONE = "expert by expert"
    BY_WEIGHT = "all of linear_fc1, then all of linear_fc2"
    TRANSPOSED = "all experts in one parameter, input first"


@dataclass(frozen=True)
class ChunkRank:
    """Coordinates of a model chunk: tensor rank, pipeline rank, chunk, expert rank, tensor rank for experts."""

    tensor: int = 0
    pipeline: int = 0
    chunk: int = 0
    experts: int = 0
    expert_tensor: int = 0


@dataclass(frozen=True)
class ParallelSizes:
    """The parallel sizes that decide which rank holds which part of a model.

    Attributes:
        tensor, pipeline: tensor-parallel and pipeline-parallel size.
        virtual: model chunks per pipeline rank.
        experts: expert-parallel size.
        expert_tensor: tensor-parallel size of the experts.
        layers: number of layers of each model chunk, where chunk `v` of rank `p` is v * pipeline + p; None: all alike.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    experts: int = 1
    expert_tensor: int = 1
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} VPP{self.virtual} EP{self.experts} expert TP{self.expert_tensor}"

    def rank(self, group: int, chunk: int) -> ChunkRank:
        """Coordinates of a chunk on model-parallel rank `group`, with experts cut like everything else."""
        tensor = group % self.tensor
        return ChunkRank(tensor, group // self.tensor, chunk, 0, tensor)

    def expert_rank(self, group: int, chunk: int) -> ChunkRank:
        """Coordinates of a chunk on rank `group` among the ranks over which experts are cut."""
        stage, inside = divmod(group, self.experts * self.expert_tensor)
        return ChunkRank(0, stage, chunk, *divmod(inside, self.expert_tensor))


@dataclass(frozen=True)
class ParameterBox:
    """A box of a parameter as it is in memory, and its position in the canonical tensor.

    Attributes:
        box: in the parameter.
        stack_index: layer and expert of the parameter: its position in the tensor's leading dimensions, if any.
        corner: first corner of the box in the tensor's other dimensions.
        transposed: whether the parameter's last two dimensions are exchanged in the tensor.
    """

    box: Box
    stack_index: tuple[int, ...]
    corner: tuple[int, ...]
    transposed: bool = False

    def in_tensor(self, part: Box) -> Box:
        """Return the box of the canonical tensor for a part of this box."""
        moved = tuple(
            (a - start + at, b - start + at) for (a, b), (start, _), at in zip(part, self.box, self.corner, strict=True)
        )
        moved = (*moved[:-2], moved[-1], moved[-2]) if self.transposed else moved
        return (*((index, index + 1) for index in self.stack_index), *moved)

    def strides_in_tensor(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Return the strides of the canonical tensor's dimensions, given those of the parameter's."""
        strides = (*strides[:-2], strides[-1], strides[-2]) if self.transposed else strides
        return (*[1] * len(self.stack_index), *strides)


@dataclass(frozen=True)
class RankParameter:
    """A parameter of a rank.

    Attributes:
        key: of the canonical tensor.
        shape: in memory, row-major.
        boxes: boxes of the parameter that together are all of it, with their positions in the tensor.
        is_read: whether the tensor is read from this parameter; False for copies that other ranks hold as well.
        is_shared_embedding: whether it is an embedding that two pipeline stages hold.
    """

    key: str
    shape: tuple[int, ...]
    boxes: tuple[ParameterBox, ...]
    is_read: bool = True
    is_shared_embedding: bool = False


class ParameterOrder:
    """Lists the parameters of every rank of a model, for given parallel sizes and orders."""

    def __init__(
        self,
        shape: ModelShape,
        sizes: Mapping[str, tuple[int, ...]],
        parallel: ParallelSizes,
        layers: LayerOrder = LayerOrder.LOCAL,
        experts: ExpertOrder = ExpertOrder.ONE_BY_ONE,
    ) -> None:
        """Set the model and the order.

        Args:
            shape: of the model.
            sizes: global shape of each tensor by canonical key.
            parallel: sizes over which the model was cut.
            layers, experts: order of the parameters in a layer and of the experts on a rank.
        """
        self._shape, self._sizes, self.parallel = shape, sizes, parallel
        self._layers, self._experts = layers, experts
        self._kinds = {kind.key: kind for kind in tensor_kinds(shape)}

    def is_possible(self) -> bool:
        """Whether the parallel sizes divide layers, experts and every tensor evenly."""
        parallel, shape = self.parallel, self._shape
        chunks = parallel.pipeline * parallel.virtual
        if shape.num_layers % chunks if parallel.layers is None else sum(parallel.layers) != shape.num_layers:
            return False
        if (shape.num_moe_experts or 1) % parallel.experts:
            return False
        for key, kind in self._kinds.items():
            dim, blocks = kind.tensor_parallel or (0, 1)
            ranks = (parallel.expert_tensor if kind.per_expert else parallel.tensor) if kind.tensor_parallel else 1
            if self._sizes[key][dim + kind.per_layer] % (ranks * blocks):
                return False
        return True

    def parameters_of(self, rank: ChunkRank) -> Iterator[RankParameter]:
        """Yield the parameters of a rank's model chunk, in the order of its modules."""
        parallel = self.parallel
        first = rank.pipeline == rank.chunk == 0
        last = rank.pipeline == parallel.pipeline - 1 and rank.chunk == parallel.virtual - 1
        shared = self._shape.tied and parallel.pipeline > 1
        for key in _BEFORE if first else ():
            yield from self._dense(key, rank, shared=shared and key == _BEFORE[0])
        chunks = parallel.pipeline * parallel.virtual
        counts = parallel.layers or (self._shape.num_layers // chunks,) * chunks
        number = rank.chunk * parallel.pipeline + rank.pipeline
        begin = sum(counts[:number])
        for layer in range(begin, begin + counts[number]):
            for name in self._layers.value:
                if name == _EXPERTS:
                    yield from self._experts_of(rank, layer)
                else:
                    yield from self._dense(LAYERS + name, rank, layer)
        for key in (*_AFTER, _OUTPUT) if last else ():
            yield from self._dense(key, rank)
        if last and shared:  # the last pipeline stage has a copy of the embedding for its output layer
            yield from (replace(each, is_read=False) for each in self._dense(_BEFORE[0], rank, shared=True))

    def _dense(
        self, key: str, rank: ChunkRank, layer: int | None = None, *, shared: bool = False
    ) -> Iterator[RankParameter]:
        """Yield a parameter that is not an expert's, if the model has it."""
        kind = self._kinds.get(key)
        if kind is not None:
            size = self._sizes[key] if layer is None else self._sizes[key][1:]
            stack_index = () if layer is None else (layer,)
            parameter = _rank_parameter(
                kind, size, stack_index, rank.tensor, self.parallel.tensor, kind.tensor_parallel
            )
            is_read = kind.tensor_parallel is not None or rank.tensor == 0
            yield replace(parameter, is_read=is_read, is_shared_embedding=shared)

    def _experts_of(self, rank: ChunkRank, layer: int) -> Iterator[RankParameter]:
        """Yield the parameters of a rank's experts in a layer."""
        kinds = [self._kinds[key] for key in _EXPERT_WEIGHTS if key in self._kinds]
        if not kinds:
            return
        count = (self._shape.num_moe_experts or 0) // self.parallel.experts
        own = range(rank.experts * count, (rank.experts + 1) * count)
        match self._experts:
            case ExpertOrder.ONE_BY_ONE:
                yield from (self._expert(kind, rank, layer, expert) for expert in own for kind in kinds)
            case ExpertOrder.BY_WEIGHT:
                yield from (self._expert(kind, rank, layer, expert) for kind in kinds for expert in own)
            case ExpertOrder.TRANSPOSED:
                yield from (self._transposed(kind, rank, layer, own) for kind in kinds)

    def _expert(self, kind: TensorKind, rank: ChunkRank, layer: int, expert: int) -> RankParameter:
        dim, blocks = kind.tensor_parallel or (1, 1)
        size, ranks = self._sizes[kind.key][2:], self.parallel.expert_tensor
        return _rank_parameter(kind, size, (layer, expert), rank.expert_tensor, ranks, (dim - 1, blocks))

    def _transposed(self, kind: TensorKind, rank: ChunkRank, layer: int, own: range) -> RankParameter:
        """All experts of a rank as one transposed parameter."""
        one = self._expert(kind, rank, layer, own.start)
        all_experts = (0, len(own))
        boxes = tuple(
            ParameterBox(
                (all_experts, each.box[1], each.box[0]), (layer,), (own.start, *reversed(each.corner)), transposed=True
            )
            for each in one.boxes
        )
        return RankParameter(kind.key, (len(own), *reversed(one.shape)), boxes)


def _rank_parameter(
    kind: TensorKind,
    size: tuple[int, ...],
    stack_index: tuple[int, ...],
    rank: int,
    ranks: int,
    cut_along: tuple[int, int] | None,
) -> RankParameter:
    """Return a tensor-parallel rank's parameter: its part of each block along the dimension that is cut.

    Args:
        kind: row of the table of tensors.
        size: of the tensor without its stacked dimensions.
        stack_index: layer and expert, if any.
        rank, ranks: tensor-parallel rank, and how many there are.
        cut_along: the dimension that is cut, and the number of blocks it consists of; None: not cut.
    """
    if cut_along is None:
        box = ParameterBox(tuple((0, n) for n in size), stack_index, (0,) * len(size))
        return RankParameter(kind.key, size, (box,))
    dim, blocks = cut_along
    part = size[dim] // (ranks * blocks)
    boxes = []
    for block in range(blocks):
        box_in_parameter = [(0, n) for n in size]
        box_in_parameter[dim] = (block * part, (block + 1) * part)
        corner = [0] * len(size)
        corner[dim] = (block * ranks + rank) * part
        boxes.append(ParameterBox(tuple(box_in_parameter), stack_index, tuple(corner)))
    own = tuple(part * blocks if d == dim else n for d, n in enumerate(size))
    return RankParameter(kind.key, own, tuple(boxes))
