"""Target directories planned to the byte, one module a format."""

from megagrow.convert.targets.choose import planned
from megagrow.convert.targets.production import OutputFile, Production
from megagrow.convert.targets.torch_dist import OBJECTS, TorchDistProduction

__all__ = ["OBJECTS", "OutputFile", "Production", "TorchDistProduction", "planned"]
