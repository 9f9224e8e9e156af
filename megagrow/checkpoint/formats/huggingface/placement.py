"""Where the values of Megatron's tensors lie in Hugging Face's: boxes in boxes, the same for reading and for writing.

Both hold the same numbers. Megatron stacks layers and experts, fuses queries, keys and values group by group, and gate
with up; Hugging Face has a tensor for each, or fuses them in another order. So every canonical tensor falls into boxes
that are boxes of Hugging Face tensors too, at most transposed. A `BoxPair` is such a pair of boxes, and the parts of an
architecture and a shape are all that a reader and a writer need to know.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megagrow.checkpoint.index import Box, whole
from megagrow.checkpoint.tensors import TensorKind, dimensions, kinds
from megagrow.config import ModelShape


@dataclass(frozen=True)
class RowRun:
    """Rows `start` to `stop` of a layer's canonical tensor: rows from `at` on of tensor number `name` of a row."""

    start: int
    stop: int
    name: int = 0
    at: int = 0


Arrange = Callable[[ModelShape, int], Iterator[RowRun]]
"""From a shape and the number of rows to all runs of them."""


def in_order(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """One tensor, row by row the same."""
    yield RowRun(0, rows)


def halves(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """Two tensors, one after the other: gate and up."""
    yield RowRun(0, rows // 2, 0)
    yield RowRun(rows // 2, rows, 1)


def by_group(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """Three tensors, queries, keys and values, each head by head; Megatron has them group by group."""
    head, queries = shape.head_dim, shape.heads_per_group * shape.head_dim
    for group in range(shape.groups):
        start = group * (queries + 2 * head)
        yield RowRun(start, start + queries, 0, group * queries)
        yield RowRun(start + queries, start + queries + head, 1, group * head)
        yield RowRun(start + queries + head, start + queries + 2 * head, 2, group * head)


def by_group_in_one(shape: ModelShape, rows: int) -> Iterator[RowRun]:
    """One tensor that holds all queries, then all keys, then all values."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.groups * shape.head_dim
    begin = (0, queries, queries + keys)
    for run in by_group(shape, rows):
        yield RowRun(run.start, run.stop, 0, begin[run.name] + run.at)


@dataclass(frozen=True)
class TableRow:
    """Where a canonical tensor's values are.

    Attributes:
        names: Hugging Face tensors, with {layer} and {expert} in place of numbers; one without {expert} holds all.
        arrange: which rows lie in which of them.
        transposed: whether they have columns first.
    """

    names: tuple[str, ...]
    arrange: Arrange = in_order
    transposed: bool = False


@dataclass(frozen=True)
class BoxPair:
    """A box of a canonical tensor that is a box of a Hugging Face tensor.

    Attributes:
        key: of the canonical tensor.
        box: in it; its first dimensions, of length 1, are the layer and the expert where `place` has none.
        name: of the Hugging Face tensor.
        place: box in that.
        transposed: whether `place` has the dimensions in reverse.
    """

    key: str
    box: Box
    name: str
    place: Box
    transposed: bool


def box_pairs(rows: Mapping[str, TableRow], shape: ModelShape) -> Iterator[BoxPair]:
    """Yield the parts of all tensors of a model: the embeddings', then layer by layer, then the rest.

    Rows of the vocabulary's padding are in none of them: Hugging Face has no such rows.
    """
    table = kinds(shape)
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
        one_each = kind.per_expert and "{expert}" in row.names[0]
        experts = range(dims.pop(0)) if one_each else (None,)
        for expert in experts:
            lead = tuple((index, index + 1) for index in (layer, expert) if index is not None)
            names = [name.format(layer=layer, expert=expert) for name in row.names]
            for run in row.arrange(shape, dims[0]):
                rest = whole(dims[1:])
                place = ((run.at, run.at + run.stop - run.start), *rest)
                place = place[::-1] if row.transposed else place
                yield BoxPair(kind.key, (*lead, (run.start, run.stop), *rest), names[run.name], place, row.transposed)


def tensor_shapes(placed: tuple[BoxPair, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the Hugging Face tensors that parts make up, in the order of the parts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in placed:
        ends = tuple(stop for _, stop in part.place)
        known = shapes.get(part.name, ends)
        shapes[part.name] = tuple(max(pair) for pair in zip(known, ends, strict=True))
    return shapes
