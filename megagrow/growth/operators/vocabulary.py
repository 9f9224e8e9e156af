"""Growth of the vocabulary: rows for added tokens, and for another padding.

Token ids keep their meaning: row i stays row i. Logits of the old tokens are the parent's; the new tokens' logits
join the softmax, so a loss is that of the parent only as far as they are small.
"""

import numpy as np

from megagrow.growth.maps import AxisMap, Exactness, Fill, Role, padded
from megagrow.growth.operators.registry import operator
from megagrow.growth.operators.width import Resize


@operator("fresh", "vocab", exact=Exactness.NEVER, paper="usual practice for added tokens")
def fresh_rows(resize: Resize) -> AxisMap:
    """Rows of added tokens, and of padding, are initialized afresh; logits of old tokens stay as they are."""
    source, new = padded(resize.size, resize.target)
    fill = {Role.WRITE: Fill.RANDOM, Role.READ: Fill.RANDOM}
    return AxisMap(resize.size, source, new, np.ones(resize.target), {}, fill)
