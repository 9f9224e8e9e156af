"""Map boxes of Megatron's tensors to boxes of Hugging Face tensors, for reading and for writing alike.

Both hold the same numbers. Megatron stacks layers and experts, fuses queries, keys and values group by group, and
fuses gate and up; Hugging Face has separate tensors, or fuses them in another order. Every canonical tensor therefore
divides into boxes that are also boxes of Hugging Face tensors, possibly transposed. A `BoxPair` is one such pair. The
pairs of an architecture and a shape are all that a reader and a writer need.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megagrow.checkpoint.index import Box, whole_box
from megagrow.checkpoint.tensors import TensorKind, dimensions, tensor_kinds
from megagrow.config import ModelShape


@dataclass(frozen=True)
class RowRun:
    """Rows `start` to `stop` of a layer's canonical tensor: rows from `at` on in tensor `name` of a `TableRow`."""

    start: int
    stop: int
    name: int = 0
    at: int = 0


Arrange = Callable[[ModelShape, int], Iterator[RowRun]]
"""Function from a shape and a number of rows to the runs that together are all rows."""


def in_order(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """One tensor with the rows in the same order."""
    yield RowRun(0, rows)


def halves(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """Two tensors, gate and up, one after the other."""
    yield RowRun(0, rows // 2, 0)
    yield RowRun(rows // 2, rows, 1)


def by_group(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """Three tensors, queries, keys and values, each ordered head by head; Megatron fuses them group by group."""
    head, queries = shape.head_dim, shape.heads_per_group * shape.head_dim
    for group in range(shape.groups):
        start = group * (queries + 2 * head)
        yield RowRun(start, start + queries, 0, group * queries)
        yield RowRun(start + queries, start + queries + head, 1, group * head)
        yield RowRun(start + queries + head, start + queries + 2 * head, 2, group * head)


def by_group_in_one(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """One tensor with all queries, then all keys, then all values."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.groups * shape.head_dim
    begin = (0, queries, queries + keys)
    for run in by_group(shape, rows):
        yield RowRun(run.start, run.stop, 0, begin[run.name] + run.at)


@dataclass(frozen=True)
class TableRow:
    """The Hugging Face tensors that hold a canonical tensor's values.

    Attributes:
        names: of the tensors, with {layer} and {expert} as placeholders; one without {expert} holds all experts.
        arrange: assigns rows to these tensors.
        transposed: whether columns come first in them.
    """

    names: tuple[str, ...]
    arrange: Arrange = in_order
    transposed: bool = False


@dataclass(frozen=True)
class BoxPair:
    """A box of a canonical tensor and the box of a Hugging Face tensor with the same values.

    Attributes:
        key: of the canonical tensor.
        box: in the canonical tensor; it starts with layer and expert, of length 1, if `place` lacks these dimensions.
        name: of the Hugging Face tensor.
        place: box in the Hugging Face tensor.
        transposed: whether the dimensions of `place` are in reverse order.
    """

    key: str
    box: Box
    name: str
    place: Box
    transposed: bool


def box_pairs(rows: Mapping[str, TableRow], shape: ModelShape) -> Iterator[BoxPair]:
    """Yield the box pairs of all tensors of a model: embeddings first, then layer by layer, then the rest.

    Rows that pad the vocabulary are left out, because Hugging Face has none.
    """
    table = tensor_kinds(shape)
    first = [kind for kind in table if kind.key.startswith("embedding.")]
    layered = [kind for kind in table if kind.per_layer]
    last = [kind for kind in table if kind not in first and not kind.per_layer]
    order: list[tuple[TensorKind, int | None]] = [(kind, None) for kind in first]
    order += [(kind, layer) for layer in range(shape.num_layers) for kind in layered]
    order += [(kind, None) for kind in last]
    for kind, layer in order:
        row, dims = rows[kind.key], list(kind.layer_shape(shape))
        if kind.dims[0] in (dimensions.VOCAB_WRITE, dimensions.VOCAB_READ):
            dims[0] = shape.vocab_size
        one_per_expert = kind.per_expert and "{expert}" in row.names[0]
        experts = range(dims.pop(0)) if one_per_expert else (None,)
        for expert in experts:
            lead = tuple((index, index + 1) for index in (layer, expert) if index is not None)
            names = [name.format(layer=layer, expert=expert) for name in row.names]
            for run in row.arrange(shape, dims[0]):
                rest = whole_box(dims[1:])
                place = ((run.at, run.at + run.stop - run.start), *rest)
                place = place[::-1] if row.transposed else place
                yield BoxPair(kind.key, (*lead, (run.start, run.stop), *rest), names[run.name], place, row.transposed)


def tensor_shapes(pairs: tuple[BoxPair, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Hugging Face tensors that the pairs make up, in the order of the pairs."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        ends = tuple(stop for _, stop in pair.place)
        known = shapes.get(pair.name, ends)
        shapes[pair.name] = tuple(max(a, b) for a, b in zip(known, ends, strict=True))
    return shapes
