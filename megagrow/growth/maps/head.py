"""The map of attention heads: KV groups, and the query heads in them."""

from dataclasses import dataclass

from megagrow.config import ModelShape
from megagrow.growth.maps.axis import AxisMap


@dataclass(frozen=True, eq=False)
class HeadMap:
    """The maps of both axes of attention: query heads and KV groups."""

    head: AxisMap
    group: AxisMap


def unchanged_heads(shape: ModelShape) -> HeadMap:
    """The map of heads that do not grow."""
    return HeadMap(head=AxisMap.unchanged(shape.num_attention_heads), group=AxisMap.unchanged(shape.groups))
