"""The unpickler of a Megatron state: tensors become views of the file, everything else stays inert."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles import TensorUnpickler, stand_in, stand_in_for

_DTYPES = frozenset(
    ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float")
)
_OPAQUE = frozenset(
    (
        ("torch", "device"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
    )
)


class StateUnpickler(TensorUnpickler):
    """An unpickler of whole states: tensors become views, Megatron's own objects stand-ins, and no more is known."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; CheckpointError for any that no state needs."""
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
            return stand_in(name)  # what such a dict would call
        known = stand_in_for(module, name)
        if known is None and ((module, name) in _OPAQUE or re.fullmatch(r"megatron\.(\w+\.)*enums", module)):
            known = stand_in(f"{module}.{name}")
        return known or super().find_class(module, name)


class _Defaults(dict[Any, Any]):
    """Stands for a defaultdict, whatever it defaults to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How a pickle of protocol 2 writes bytes."""
    return text.encode("latin1")


def _rebuild_typed(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with Python attributes: the tensor."""
    return rebuild(*arguments)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    """A parameter: its tensor."""
    return data


_REBUILD: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
