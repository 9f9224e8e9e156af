"""Which parameters a rank of Megatron-Core holds, in the order of its modules, and what of each tensor they are.

A flat buffer does not say what lies in it: it is the parameters of one rank's model chunk in the order in which
`GPTModel.named_parameters()` gives them. That order is a table here, one row a parameter of a layer. It differs in
two places: layers of Transformer Engine hold their norm inside the linear layer behind it, and experts lie one by
one, weight by weight, or (the old GroupedMLP) as one transposed parameter. Orders are tried against what is known of
a buffer; which one is right is not decided here.

Sources: Megatron-Core 0.16.1, `models/gpt/gpt_model.py`, `transformer/{transformer_layer,attention}.py`,
`transformer/moe/{moe_layer,experts}.py`; Transformer Engine 2, `pytorch/module/layernorm_linear.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from megagrow.checkpoint.index import Box
from megagrow.checkpoint.tensors import LAYERS, TensorKind, kinds
from megagrow.config import ModelShape

_EXPERTS = "mlp.experts"
_QKV_NORM = ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias")
_PROJ = ("self_attention.linear_proj.weight", "self_attention.linear_proj.bias")
_REST = (
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
_BEHIND = ("decoder.final_layernorm.weight", "decoder.final_layernorm.bias")
_OUTPUT = "output_layer.weight"


class LayerOrder(Enum):
    """Order of a layer's parameters."""

    LOCAL = (*_QKV_NORM, *_PROJ, *_REST)
    FUSED = (*_PROJ, *_QKV_NORM, *_REST)


class ExpertOrder(Enum):
    """Order of the experts that a rank holds: SequentialMLP, TEGroupedMLP, GroupedMLP."""

    ONE_BY_ONE = "expert by expert"
    BY_WEIGHT = "all of linear_fc1, then all of linear_fc2"
    TRANSPOSED = "all experts in one parameter, input before output"


@dataclass(frozen=True)
class ChunkRank:
    """A model chunk's place: tensor rank, pipeline rank, chunk, expert rank, tensor rank among the experts."""

    tensor: int = 0
    pipeline: int = 0
    chunk: int = 0
    experts: int = 0
    expert_tensor: int = 0


@dataclass(frozen=True)
class Cut:
    """How a model was cut over ranks, as far as it decides who holds what.

    Attributes:
        tensor, pipeline, virtual: parallel sizes; virtual: model chunks a pipeline rank.
        experts: expert-parallel size.
        expert_tensor: tensor-parallel size of the experts.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    experts: int = 1
    expert_tensor: int = 1

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} VPP{self.virtual} EP{self.experts} expert TP{self.expert_tensor}"

    def rank(self, group: int, chunk: int) -> ChunkRank:
        """The place of a chunk of the model-parallel rank `group`; experts are cut like all else."""
        tensor = group % self.tensor
        return ChunkRank(tensor, group // self.tensor, chunk, 0, tensor)

    def expert_rank(self, group: int, chunk: int) -> ChunkRank:
        """The place of a chunk of the rank `group` of those that experts are cut over."""
        stage, inside = divmod(group, self.experts * self.expert_tensor)
        return ChunkRank(0, stage, chunk, *divmod(inside, self.expert_tensor))


@dataclass(frozen=True)
class ParameterBox:
    """A box of a parameter, as it lies in memory, and where that is in the canonical tensor.

    Attributes:
        box: of the parameter.
        before: places in the tensor's first dimensions that the parameter lacks: its layer, its expert.
        corner: of the box in the tensor's other dimensions.
        turned: whether the parameter has the last two dimensions the other way round.
    """

    box: Box
    before: tuple[int, ...]
    corner: tuple[int, ...]
    turned: bool = False

    def place(self, part: Box) -> Box:
        """The box of the canonical tensor that a part of the piece's box is."""
        moved = tuple(
            (a - start + at, b - start + at) for (a, b), (start, _), at in zip(part, self.box, self.corner, strict=True)
        )
        moved = (*moved[:-2], moved[-1], moved[-2]) if self.turned else moved
        return (*((place, place + 1) for place in self.before), *moved)

    def strides(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """Strides of the canonical tensor's dimensions in memory, from those of the parameter's."""
        own = (*own[:-2], own[-1], own[-2]) if self.turned else own
        return (*[1] * len(self.before), *own)


@dataclass(frozen=True)
class RankParameter:
    """A parameter of a rank.

    Attributes:
        key: of the canonical tensor.
        shape: as it lies in memory, row by row.
        pieces: what of the tensor it is.
        counts: whether it is the one that is saved, of those that several ranks hold alike.
        shared: whether it is an embedding that two pipeline stages hold.
    """

    key: str
    shape: tuple[int, ...]
    pieces: tuple[ParameterBox, ...]
    counts: bool = True
    shared: bool = False


class ParameterOrder:
    """The parameters of every rank of a model that was cut in a known way."""

    def __init__(
        self,
        shape: ModelShape,
        sizes: Mapping[str, tuple[int, ...]],
        cut: Cut,
        layers: LayerOrder = LayerOrder.LOCAL,
        experts: ExpertOrder = ExpertOrder.ONE_BY_ONE,
    ) -> None:
        """Args: the shape of the model, the global shape of each tensor by key, the cut, and the two orders."""
        self._shape, self._sizes, self._cut = shape, sizes, cut
        self._layers, self._experts = layers, experts
        self._kinds = {kind.key: kind for kind in kinds(shape)}

    def fits(self) -> bool:
        """Whether every tensor can be cut so."""
        cut, shape = self._cut, self._shape
        if shape.num_layers % (cut.pipeline * cut.virtual) or (shape.num_moe_experts or 1) % cut.experts:
            return False
        for key, kind in self._kinds.items():
            dim, blocks = kind.tensor_parallel or (0, 1)
            ranks = (cut.expert_tensor if kind.per_expert else cut.tensor) if kind.tensor_parallel else 1
            if self._sizes[key][dim + kind.per_layer] % (ranks * blocks):
                return False
        return True

    def of(self, rank: ChunkRank) -> Iterator[RankParameter]:
        """The parameters of a rank's model chunk, in the order of its modules."""
        cut = self._cut
        first = rank.pipeline == rank.chunk == 0
        last = rank.pipeline == cut.pipeline - 1 and rank.chunk == cut.virtual - 1
        shared = self._shape.tied and cut.pipeline > 1
        for key in _BEFORE if first else ():
            yield from self._plain(key, rank, shared=shared and key == _BEFORE[0])
        count = self._shape.num_layers // (cut.pipeline * cut.virtual)
        begin = (rank.chunk * cut.pipeline + rank.pipeline) * count
        for layer in range(begin, begin + count):
            for name in self._layers.value:
                if name == _EXPERTS:
                    yield from self._of_experts(rank, layer)
                else:
                    yield from self._plain(LAYERS + name, rank, layer)
        for key in (*_BEHIND, _OUTPUT) if last else ():
            yield from self._plain(key, rank)
        if last and shared:  # the last stage has a copy of the embedding for its output layer
            yield from (replace(each, counts=False) for each in self._plain(_BEFORE[0], rank, shared=True))

    def _plain(
        self, key: str, rank: ChunkRank, layer: int | None = None, *, shared: bool = False
    ) -> Iterator[RankParameter]:
        kind = self._kinds.get(key)
        if kind is not None:
            size = self._sizes[key] if layer is None else self._sizes[key][1:]
            before = () if layer is None else (layer,)
            one = _cut(kind, size, before, rank.tensor, self._cut.tensor, kind.tensor_parallel)
            yield replace(one, counts=kind.tensor_parallel is not None or rank.tensor == 0, shared=shared)

    def _of_experts(self, rank: ChunkRank, layer: int) -> Iterator[RankParameter]:
        kinds = [self._kinds[key] for key in _EXPERT_WEIGHTS if key in self._kinds]
        if not kinds:
            return
        count = (self._shape.num_moe_experts or 0) // self._cut.experts
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
        size, ranks = self._sizes[kind.key][2:], self._cut.expert_tensor
        return _cut(kind, size, (layer, expert), rank.expert_tensor, ranks, (dim - 1, blocks))

    def _transposed(self, kind: TensorKind, rank: ChunkRank, layer: int, own: range) -> RankParameter:
        one = self._expert(kind, rank, layer, own.start)
        every = (0, len(own))
        pieces = tuple(
            ParameterBox(
                (every, piece.box[1], piece.box[0]), (layer,), (own.start, *reversed(piece.corner)), turned=True
            )
            for piece in one.pieces
        )
        return RankParameter(kind.key, (len(own), *reversed(one.shape)), pieces)


def _cut(
    kind: TensorKind,
    size: tuple[int, ...],
    before: tuple[int, ...],
    rank: int,
    ranks: int,
    along: tuple[int, int] | None,
) -> RankParameter:
    """The parameter of a tensor-parallel rank: of each of the blocks of one dimension its part."""
    if along is None:
        return RankParameter(kind.key, size, (ParameterBox(tuple((0, n) for n in size), before, (0,) * len(size)),))
    dim, blocks = along
    part = size[dim] // (ranks * blocks)
    pieces = []
    for block in range(blocks):
        box = [(0, n) for n in size]
        box[dim] = (block * part, (block + 1) * part)
        corner = [0] * len(size)
        corner[dim] = (block * ranks + rank) * part
        pieces.append(ParameterBox(tuple(box), before, tuple(corner)))
    own = tuple(part * blocks if d == dim else n for d, n in enumerate(size))
    return RankParameter(kind.key, own, tuple(pieces))
