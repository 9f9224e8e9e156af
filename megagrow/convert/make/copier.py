"""Makes the pieces of a conversion that only copies, without torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megagrow.checkpoint.index import Box

if TYPE_CHECKING:
    from megagrow.convert.plan import Task
from megagrow.convert.make.rows import Piece, Rows


class Copier(Rows):
    """Makes the pieces of a conversion all of whose values are their source's own, bit for bit."""

    def pieces(self, task: "Task", box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, in row-major order."""
        assert task.origin is not None
        key, dtype = task.origin.key, self._conversion.weight_dtype
        for part in self.cut(task.kind, box):
            parts = [dim.part(start, stop) for dim, (start, stop) in zip(self._maps(task.kind), part, strict=True)]
            yield self._piece(task, task.kind.key, part, self._gathered(task, key, parts), dtype)
        self._forget(task, box, None)
