"""Growth operators: pure functions from sizes to maps, registered by name.

Importing this package registers the operators of each module below. A function under `@operator` in one of them is
all that a new operator needs (docs/adding_an_operator.md).
"""

from megagrow.growth.operators import experts, heads, layers, vocabulary, width  # noqa: F401  registers operators
from megagrow.growth.operators.plan import plan_growth
from megagrow.growth.operators.registry import Operator, operator, operators
from megagrow.growth.operators.resize import Resize

__all__ = ["Operator", "Resize", "operator", "operators", "plan_growth"]
