"""Makes the pieces of a conversion that only copies, without torch."""

from collections.abc import Iterator

from megagrow.checkpoint.index import Box
from megagrow.convert.make.rows import Piece, SourceRows
from megagrow.convert.plan import Task


class Copier(SourceRows):
    """Makes the pieces of a conversion in which every task is a copy and the target gets no optimizer state."""

    def pieces(self, task: Task, box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of a task's tensor, in row-major order."""
        for part in self.cut(task.kind, box):
            values = self._copy_values(task, part)
            yield self._piece(task, task.kind.key, part, values, self._conversion.weight_dtype_of(task.kind.key))
        self._forget(task, box, "param" if self._conversion.has_optimizer else None)
