"""A store that is written by piece."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Sink(Protocol):
    """A store that is written by piece."""

    def put(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], values: "Tensor") -> None:
        """Add a part of the tensor `key` of global `shape`, whose first entry lies at `offset`."""

    def put_object(self, key: str, value: Any) -> None:
        """Add a small object."""
