"""The unpickler of Megatron's states and objects: tensors become views of their file, all else is inert.

Megatron-LM also pickles its arguments, including enums and random states. Those become stand-ins, and `to_plain` then
makes plain data of them without importing Megatron or numpy: attributes become a dict, everything else text.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.pickles.stand_ins import Fixed, Function, Opaque, StandIn, TypeName, stand_in_class
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor, TensorUnpickler
from megagrow.errors import CheckpointError

ARGUMENTS = ("argparse.Namespace", "types.SimpleNamespace")
_ENUMS = (
    "signal.Signals",
    "megatron.core.enums.ModelType",
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "AttnMaskType", "CudaGraphScope")),
)
_KINDS: Mapping[str, type[StandIn]] = {
    **dict.fromkeys((*ARGUMENTS, "megatron.core.optimizer.optimizer_config.OptimizerConfig"), StandIn),
    **dict.fromkeys((*_ENUMS, "pathlib.PosixPath"), Fixed),
    **dict.fromkeys(("numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType", "_io.BytesIO"), Opaque),
    **{
        f"numpy.{module}.multiarray.{name}": Opaque
        for module in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
    **dict.fromkeys(("torch.device", "torch.serialization._get_layout"), Fixed),
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter"), Fixed),
    **dict.fromkeys(("builtins.dict", "builtins.list", "builtins.int", "builtins.float"), Fixed),
}
"""What Megatron registers as safe with torch, and what else occurs in a state: the last are a defaultdict's factory."""
_DTYPES = {dtype.value: dtype for dtype in DType} | {"float": DType.FLOAT32}
"""Types of a tensor's storage by their names in torch; `float` is older pickles' name of float32."""
_ENUM_MODULES = re.compile(r"megatron\.(\w+\.)*enums")


class StateUnpickler(TensorUnpickler):
    """Unpickles a state: tensors become views, Megatron's objects stand-ins, plain values stay."""

    because = ""

    def stand_in(self, module: str, name: str) -> Any:
        """Return what replaces a name; None for any name that no state needs."""
        if kind := _KINDS.get(f"{module}.{name}"):
            return stand_in_class(f"{module}.{name}", kind)
        if _ENUM_MODULES.fullmatch(module) and name.isidentifier():
            return stand_in_class(f"{module}.{name}", Fixed)
        if module == "torch" and name in _DTYPES:
            return TypeName(_DTYPES[name])
        replacement = self._functions().get((module, name))
        return Function(replacement) if replacement is not None else super().stand_in(module, name)

    def names(self) -> list[tuple[str, str]]:
        """Return the names of a state's parts; of Megatron's enums, one that is not listed."""
        classes = [*_KINDS, *(f"torch.{name}" for name in _DTYPES), "megatron.core.any.enums.Any"]
        listed = [(module, name) for module, _, name in (each.rpartition(".") for each in classes)]
        return [*listed, *self._functions(), *super().names()]

    def _functions(self) -> dict[tuple[str, str], Callable[..., Any]]:
        return {
            ("torch", "Size"): self.size,
            ("builtins", "set"): self.members,
            ("_codecs", "encode"): self.latin1,
            ("collections", "defaultdict"): self.defaults,
            ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        }


def _rebuild_typed(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return the tensor of a tensor with Python attributes."""
    if type(rebuild) is not Function or type(arguments) is not tuple:
        raise CheckpointError("refused: a tensor that is not rebuilt by a function of torch's")
    return _rebuild_parameter(rebuild(*arguments))


def _rebuild_parameter(data: Any, *rest: Any) -> PickledTensor:
    """Return the tensor of a parameter."""
    if type(data) is not PickledTensor:
        raise CheckpointError("refused: a parameter that is not a tensor")
    return data
