"""Growth operators: pure functions from sizes to maps, registered by name."""

from megagrow.growth.operators import experts, heads, layers, vocabulary, width  # noqa: F401  registers them
from megagrow.growth.operators.plan import plan_growth
from megagrow.growth.operators.registry import Operator, operators

__all__ = ["Operator", "operators", "plan_growth"]
