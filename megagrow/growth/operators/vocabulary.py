"""The vocabulary operator: rows for added tokens, or for a different padding.

Token ids keep their meaning: row i stays row i. The logits of old tokens equal the parent's. The logits of new tokens
join the softmax, so the loss equals the parent's only as far as those are small.
"""

import numpy as np

from megagrow.growth.maps import AxisMap, Exactness, Fill, Role, padded
from megagrow.growth.operators.registry import operator
from megagrow.growth.operators.resize import Resize


@operator("fresh", "vocab", exact=Exactness.NEVER, paper="usual practice for added tokens")
def fresh_rows(resize: Resize) -> AxisMap:
    """Rows of added tokens and padding are freshly initialized; the logits of old tokens are unchanged."""
    source, new = padded(resize.size, resize.target)
    fill = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.RANDOM}
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, fill)
