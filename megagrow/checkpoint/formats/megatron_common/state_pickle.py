"""The unpickler of Megatron's rank files and optimizer objects: tensors become views of the file, the rest is inert.

Nothing is imported for a pickle: Megatron's own objects become stand-ins, and any other name is refused.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import TensorUnpickler, allowed_class, unimported_class

_DTYPES = frozenset(
    ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float")
)
"""Names in torch of the types that a tensor's storage may have; `float` is older pickles' name of float32."""
_OPAQUE = frozenset(
    (
        ("torch", "device"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
    )
)
"""Classes that occur in a state and are never needed."""


class StateUnpickler(TensorUnpickler):
    """Unpickles the state of a rank: tensors become views, Megatron's objects stand-ins, plain values stay."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what replaces a name; CheckpointError for any name that no state needs."""
        if (module, name) in _REBUILD:
            return _REBUILD[module, name]
        if module == "torch" and name in _DTYPES:
            return DType("float32" if name == "float" else name)
        if (module, name) == ("torch", "Size"):
            return tuple
        if name == "set" and module in ("builtins", "__builtin__"):
            return set
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) == ("collections", "defaultdict"):
            return type("Defaults", (_Defaults,), {})
        if name in ("dict", "list", "int", "float") and module in ("builtins", "__builtin__"):
            return unimported_class(name)  # the default factory of a defaultdict
        replacement = allowed_class(module, name)
        if replacement is None and ((module, name) in _OPAQUE or re.fullmatch(r"megatron\.(\w+\.)*enums", module)):
            replacement = unimported_class(f"{module}.{name}")
        return replacement or super().find_class(module, name)


class _Defaults(dict[Any, Any]):
    """Stand-in for a defaultdict; ignores its default factory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Decode bytes as pickle protocol 2 encodes them."""
    return text.encode("latin1")


def _rebuild_typed(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return the tensor of a tensor with Python attributes."""
    return rebuild(*arguments)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    """Return the tensor of a parameter."""
    return data


_REBUILD: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
