"""Target directories planned to the byte, one module per format."""

from megagrow.convert.targets.choose import plan_target
from megagrow.convert.targets.finite import FiniteCheck
from megagrow.convert.targets.model_card import describe_growth
from megagrow.convert.targets.protocol import OutputFile, PlannedTarget
from megagrow.convert.targets.torch_dist import OBJECTS, TorchDistTarget

__all__ = ["OBJECTS", "FiniteCheck", "OutputFile", "PlannedTarget", "TorchDistTarget", "describe_growth", "plan_target"]
